"""`python -m llmgr_rec.score`: ranks the catalog for each session of Parquet files; one output row per input row.

    python -m llmgr_rec.score --run RUN --input SESSIONS --output FOLDER
    torchrun --nproc_per_node 2 -m llmgr_rec.score --run_folder RUN --input SESSIONS --output FOLDER

The same command continues an interrupted job: complete parts are kept, and the result is byte-identical. FOLDER is
complete when it contains _SUCCESS.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from llmgr_rec.cli import (
    add_code_argument,
    add_run_argument,
    make_parser,
    parse_args,
    run_cli,
)
from llmgr_rec.comma_separated import split_list
from llmgr_rec.config import DType, StageName
from llmgr_rec.evaluation.ranking_arguments import add_ranking_arguments
from llmgr_rec.first_and_last_line import print_result
from llmgr_rec.library_imports import command_imports
from llmgr_rec.paths import StoragePath
from llmgr_rec.remote_path import as_path
from llmgr_rec.training.freed_memory import share_freed_memory

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def main(argv: Sequence[str]) -> None:
    """Parses arguments, checks the whole input, then scores.

    Args:
        argv: Arguments of the command.

    Raises:
        UserError: An argument, the run, the input or the output folder is not usable; raised on every rank before the
            process group starts and before anything is written.
    """
    arguments = parse_args(_parser(), argv)

    # Before libraries start threads.
    share_freed_memory()
    with command_imports():
        from llmgr_rec.scoring.score_run import ScoreRequest, score_run

    totals = score_run(
        ScoreRequest(
            run=as_path(arguments.run),
            input=as_path(arguments.input),
            output=as_path(arguments.output),
            k=arguments.k,
            columns=split_list(arguments.columns),
            titles=arguments.titles,
            unknown_items=arguments.unknown_items,
            repeats=arguments.repeats,
            domains=arguments.domains,
            stage=arguments.stage,
            max_length=arguments.max_length,
            part_rows=arguments.part_rows,
            batch_size=arguments.batch_size,
            device=arguments.device,
            threads=arguments.threads,
            allow_code=split_list(arguments.allow_code),
            table_dtype=arguments.table_dtype,
            llm_dtype=arguments.llm_dtype,
            llm_layers=arguments.llm_layers,
            llm_budget=arguments.llm_budget,
            llm_threshold=arguments.llm_threshold,
        )
    )
    merged = totals.consecutive_repeats
    repeats = f"{merged:,} clicks on the item clicked just before merged, " if merged else ""
    print_result(
        "score",
        f"{totals.rows_out:,} sessions, {totals.unknown_items:,} clicks on unknown items skipped, {repeats}"
        f"{totals.fallback_rows:,} sessions without a known click got the most popular items, "
        f"{totals.llm_rows:,} were encoded by a language model",
        f"{arguments.output} (Parquet files: {totals.parts})",
    )


def _parser() -> "ArgumentParser":
    parser = make_parser("llmgr_rec.score")
    add_run_argument(parser)
    parser.add_argument(
        "--input",
        type=StoragePath,
        required=True,
        help="Parquet file, or folder of Parquet files at any depth, with columns session_id and items (a list of item "
        "ids, oldest first), such as a split of a prepared data set.",
    )
    _add_output_arguments(parser)
    parser.add_argument(
        "--unknown_items",
        type=Literal["skip", "error"],
        default="skip",
        help="Clicks on items that are not in the catalog: skip and count them, or stop before anything is written.",
    )
    parser.add_argument("--stage", type=StageName, help="Stage whose model to use; default: the last complete one.")
    add_code_argument(parser)
    add_ranking_arguments(parser)
    parser.add_argument("--part_rows", type=int, default=16384, help="Sessions per output file.")
    parser.add_argument("--batch_size", type=int, help="Sessions per batch; default: the setting of the run.")
    _add_language_arguments(parser)
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], help="Default: the setting of the run.")
    return parser


def _add_output_arguments(parser: "ArgumentParser") -> None:
    """Adds the options of the output."""
    parser.add_argument("--output", type=StoragePath, required=True, help="Output folder; continued if incomplete.")
    parser.add_argument("--k", type=int, default=20, help="Items per session.")
    parser.add_argument(
        "--columns",
        type=str,
        default="session_id",
        help="Comma-separated input columns to copy to the output, such as session_id,target. A folder dt=2026-11-01 "
        "gives its files a column dt.",
    )
    parser.add_argument("--titles", action="store_true", help="Add a column titles: the titles of the ranked items.")


def _add_language_arguments(parser: "ArgumentParser") -> None:
    """Adds the options that trade quality for speed."""
    parser.add_argument(
        "--llm_dtype",
        type=DType,
        help="Dtype of the language model; default: the setting of the run.",
    )
    parser.add_argument(
        "--llm_layers", type=int, default=0, help="First layers of the language model to use; 0 uses all."
    )
    parser.add_argument(
        "--llm_budget",
        type=float,
        help="Share of sessions that are routed to the language model: those with the most uncertain ranking of the "
        "session recommender; default: 1.",
    )
    parser.add_argument(
        "--llm_threshold",
        type=float,
        help="Instead of a budget: uncertainty, in nats, above which a session is routed to the language model.",
    )


if __name__ == "__main__":
    run_cli(main)
