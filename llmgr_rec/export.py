"""`python -m llmgr_rec.export`: writes a trained session recommender as one program that runs without this package.

    python -m llmgr_rec.export --run RUN --output model.pt2

docs/export.md says how to load it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmgr_rec.bounds import Bounds, check_options
from llmgr_rec.cli import add_code_argument, add_run_argument, make_parser, parse_args, run_cli
from llmgr_rec.comma_separated import split_list
from llmgr_rec.config import StageName
from llmgr_rec.first_and_last_line import print_result, print_start
from llmgr_rec.library_imports import command_imports
from llmgr_rec.paths import LocalPath
from llmgr_rec.remote_path import as_path

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def main(argv: Sequence[str]) -> None:
    """Parses arguments and writes the program and its catalog.

    Args:
        argv: Arguments of the command.

    Raises:
        UserError: The run has no complete model, its model has a language model, or the output cannot be written.
    """
    arguments = parse_args(_parser(), argv)
    check_options({"k": arguments.k}, {"k": Bounds(at_least=1, at_most=1_000_000)})

    with command_imports():
        from llmgr_rec.scoring.program_export import check_output, write_program
        from llmgr_rec.storage.bundle import open_bundle

    output, run = Path(arguments.output), as_path(arguments.run)
    check_output(output)
    path = run / "export" / arguments.stage if arguments.stage else run
    files = open_bundle(path, split_list(arguments.allow_code))
    print_start("export", [files.path], output)
    written = write_program(files, output, arguments.k)
    lists = f"lists of {written.k:,} of {written.num_items:,} items, whose ids are in {written.items}"
    print_result("export", lists, written.program)


def _parser() -> "ArgumentParser":
    parser = make_parser("llmgr_rec.export")
    add_run_argument(parser)
    parser.add_argument(
        "--output",
        type=LocalPath,
        required=True,
        help="Program to write, NAME.pt2; the item ids are written to NAME.items.parquet beside it.",
    )
    parser.add_argument("--k", type=int, default=20, help="Items per session.")
    parser.add_argument("--stage", type=StageName, help="Stage whose model to use; default: the last complete one.")
    add_code_argument(parser)
    return parser


if __name__ == "__main__":
    run_cli(main)
