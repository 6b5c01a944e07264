"""`python -m llmgr_rec.evaluate`: evaluates a run and baselines by ranking the whole catalog for every session.

python -m llmgr_rec.evaluate --run RUN --dataset DATASET --output metrics.json
torchrun --nproc_per_node 2 -m -- llmgr_rec.evaluate --run RUN --dataset DATASET --output metrics.json
"""

from collections.abc import Sequence
from typing import Literal

from llmgr_rec.cli import (
    add_code_argument,
    add_run_argument,
    is_rank0,
    make_parser,
    parse_args,
    run_cli,
)
from llmgr_rec.comma_separated import split_list, split_names, split_numbers
from llmgr_rec.evaluation.ranking_arguments import add_ranking_arguments
from llmgr_rec.evaluation.results import CUTOFFS, MODEL_NAMES
from llmgr_rec.first_and_last_line import print_result
from llmgr_rec.library_imports import command_imports
from llmgr_rec.paths import StoragePath
from llmgr_rec.remote_path import as_path

MODELS = tuple(MODEL_NAMES)


def main(argv: Sequence[str]) -> None:
    """Parses arguments, evaluates, writes the metrics file and prints the table.

    Args:
        argv: Arguments of the command.

    Raises:
        UserError: An argument, the run or the data set is not usable; raised on every rank before the process group
            starts.
    """
    parser = make_parser("llmgr_rec.evaluate")
    add_run_argument(parser)
    parser.add_argument("--dataset", type=StoragePath, required=True, help="Folder written by llmgr_rec.prepare.")
    parser.add_argument("--split", type=Literal["test", "valid"], default="test", help="Split to evaluate.")
    parser.add_argument("--output", type=StoragePath, required=True, help="Metrics file (JSON) to write.")
    parser.add_argument(
        "--models",
        type=str,
        help=f"Comma-separated models: {', '.join(MODELS)}, and import paths of baselines, such as "
        "my_package.knn:Recent; default: popularity, item_knn and all trained models of the run.",
    )
    parser.add_argument(
        "--cutoffs",
        type=str,
        default=",".join(map(str, CUTOFFS)),
        help="Comma-separated cutoffs of HR, NDCG and MRR, 1 to 255; 20 is added, because comparisons use it.",
    )
    add_code_argument(parser)
    add_ranking_arguments(parser)
    parser.add_argument("--batch_size", type=int, help="Sessions per batch; default: the run's; twice it without LLM.")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], help="Default: the setting of the run.")
    arguments = parse_args(parser, argv)

    with command_imports():
        from llmgr_rec.evaluation.evaluate_run import EvaluationRequest, evaluate_run
        from llmgr_rec.evaluation.evaluated import Evaluated
        from llmgr_rec.evaluation.headline import headline
        from llmgr_rec.evaluation.results import blend_notes, format_beyond_accuracy, format_domains, format_table

    content = evaluate_run(
        EvaluationRequest(
            run=as_path(arguments.run),
            dataset=as_path(arguments.dataset),
            split=arguments.split,
            output=as_path(arguments.output),
            models=split_names(arguments.models, "--models", MODELS, import_paths=True) if arguments.models else None,
            repeats=arguments.repeats,
            domains=arguments.domains,
            max_length=arguments.max_length,
            batch_size=arguments.batch_size,
            device=arguments.device,
            cutoffs=split_numbers(arguments.cutoffs, "--cutoffs", "5,10,20"),
            threads=arguments.threads,
            table_dtype=arguments.table_dtype,
            allow_code=split_list(arguments.allow_code),
        )
    )
    if is_rank0():
        print(format_table(content[arguments.split], content["cutoffs"]))
        for table in format_domains(content[arguments.split]):
            print(f"\n{table}")
        print(f"\n{format_beyond_accuracy(content[arguments.split])}")
        for note in blend_notes(content["blends"]):
            print(note)
        print(headline(Evaluated(as_path(arguments.output), content)))
    count = f"{content['count']:,} {arguments.split} sessions, {content['num_items']:,} items"
    print_result("evaluate", f"{count}; {content['protocol']}", arguments.output)


if __name__ == "__main__":
    run_cli(main)
