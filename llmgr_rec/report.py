"""`python -m llmgr_rec.report`: writes a report of a run, or a comparison of several, as a self-contained HTML page.

python -m llmgr_rec.report --run RUN --output FOLDER
python -m llmgr_rec.report --run RUN --run OTHER --output FOLDER
"""

from collections.abc import Sequence

from llmgr_rec.bounds import Bounds, check_options
from llmgr_rec.cli import add_code_argument, add_run_argument, make_parser, parse_args, run_cli
from llmgr_rec.comma_separated import split_list
from llmgr_rec.first_and_last_line import print_result
from llmgr_rec.library_imports import command_imports
from llmgr_rec.paths import StoragePath
from llmgr_rec.remote_path import as_path


def main(argv: Sequence[str]) -> None:
    """Parses arguments and writes the report.

    Args:
        argv: Arguments of the command.

    Raises:
        UserError: A run, metrics, scores or the data set is absent, or they do not belong together.
    """
    parser = make_parser("llmgr_rec.report")
    add_run_argument(parser, several=True)
    parser.add_argument(
        "--output", type=StoragePath, required=True, help="Folder for index.html, plots and results.csv."
    )
    parser.add_argument(
        "--metrics",
        type=StoragePath,
        action="append",
        help="Metrics file of llmgr_rec.evaluate; repeat it as often as --run; default: RUN/metrics.json if it exists.",
    )
    parser.add_argument(
        "--scores",
        type=StoragePath,
        help="Output folder of llmgr_rec.score for the example sessions of the first run; default: rank.",
    )
    parser.add_argument(
        "--dataset",
        type=StoragePath,
        help="Folder written by llmgr_rec.prepare; default: the path in the metrics file.",
    )
    add_code_argument(parser)
    parser.add_argument("--sessions", type=int, default=24, help="Number of example sessions, half of them hits.")
    arguments = parse_args(parser, argv)
    check_options({"sessions": arguments.sessions}, {"sessions": Bounds(at_least=0, at_most=10_000)})

    with command_imports():
        from llmgr_rec.evaluation.report_page import ReportRequest, write_report

    report = write_report(
        ReportRequest(
            runs=[as_path(run) for run in arguments.run],
            output=as_path(arguments.output),
            metrics=[as_path(file) for file in arguments.metrics or []],
            scores=as_path(arguments.scores) if arguments.scores else None,
            dataset=as_path(arguments.dataset) if arguments.dataset else None,
            sessions=arguments.sessions,
            allow_code=split_list(arguments.allow_code),
        )
    )
    print_result("report", report.headline, report.page)


if __name__ == "__main__":
    run_cli(main)
