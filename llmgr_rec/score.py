"""`python -m llmgr_rec.score`: Parquet files of sessions in, Parquet files of ranked items out, one row for each row.

    python -m llmgr_rec.score --run RUN --input SESSIONS --output FOLDER
    torchrun --nproc_per_node 2 -m llmgr_rec.score --run_folder RUN --input SESSIONS --output FOLDER

An interrupted job goes on with the same command: finished parts stay, and the result is the same to the byte. FOLDER is
complete when it holds _SUCCESS.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmgr_rec.cli import (
    add_code_argument,
    add_run_argument,
    is_rank0,
    make_parser,
    parse_args,
    run_cli,
    split_code,
)
from llmgr_rec.config import DType, StageName

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def main(argv: Sequence[str]) -> None:
    """Parses arguments, checks the whole input, then scores.

    Raises:
        UserError: Something in arguments, run, input or output folder is wrong. It is raised on every rank before any
            rank waits for another, and before anything is written.
    """
    parser = make_parser("llmgr_rec.score", "Ranks the catalog for every session of a folder of Parquet files.")
    add_run_argument(parser)
    parser.add_argument(
        "--input",
        type=str,
        required=True,
        help="Parquet file, or folder of some, with session_id and items (a list of item ids, oldest first); "
        "a split of a prepared data set will do.",
    )
    _add_output_arguments(parser)
    parser.add_argument(
        "--unknown_items",
        type=Literal["skip", "error"],
        default="skip",
        help="Clicks on items that the model does not know: leave out and count, or stop before anything is written.",
    )
    parser.add_argument("--stage", type=StageName, help="Model to score with; default the furthest.")
    add_code_argument(parser)
    parser.add_argument("--max_length", type=int, default=50, help="Newest clicks that the model sees.")
    parser.add_argument("--part_rows", type=int, default=16384, help="Sessions of an output file.")
    parser.add_argument("--batch_size", type=int, help="Sessions of a batch; default the run's setting.")
    _add_language_arguments(parser)
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], help="Default the run's setting.")
    arguments = parse_args(parser, argv)

    from llmgr_rec.scoring.score_run import ScoreRequest, score_run

    totals = score_run(
        ScoreRequest(
            run=Path(arguments.run),
            input=Path(arguments.input),
            output=Path(arguments.output),
            k=arguments.k,
            columns=[name.strip() for name in arguments.columns.strip("[]").split(",") if name.strip()],
            unknown_items=arguments.unknown_items,
            exclude_seen=arguments.exclude_seen,
            stage=arguments.stage,
            max_length=arguments.max_length,
            part_rows=arguments.part_rows,
            batch_size=arguments.batch_size,
            device=arguments.device,
            allow_code=split_code(arguments.allow_code),
            llm_dtype=arguments.llm_dtype,
            llm_layers=arguments.llm_layers,
            llm_budget=arguments.llm_budget,
            llm_threshold=arguments.llm_threshold,
        )
    )
    if is_rank0():
        print(
            f"scored {totals.rows_out:,} sessions into {totals.parts} parts in {arguments.output}; "
            f"{totals.unknown_items:,} clicks on unknown items left out, "
            f"{totals.fallback_rows:,} sessions without a known click got the most popular items, "
            f"{totals.llm_rows:,} were encoded by a language model"
        )


def _add_output_arguments(parser: "ArgumentParser") -> None:
    """Adds what goes where."""
    parser.add_argument("--output", type=str, required=True, help="Folder to make, or to go on with.")
    parser.add_argument("--k", type=int, default=20, help="Items a session.")
    parser.add_argument(
        "--columns", type=str, default="session_id", help="Input columns to pass on as they are: session_id,target,..."
    )
    parser.add_argument(
        "--exclude_seen",
        type=bool | Literal["auto"],
        default="auto",
        help="Keep items of a session out of its own list; auto does where no training session holds an item twice.",
    )


def _add_language_arguments(parser: "ArgumentParser") -> None:
    """Adds the options that trade quality for speed."""
    parser.add_argument(
        "--llm_dtype",
        type=DType,
        help="Number format of the language model; default the run's setting.",
    )
    parser.add_argument("--llm_layers", type=int, default=0, help="First layers of the language model used; 0 all.")
    parser.add_argument(
        "--llm_budget",
        type=float,
        help="Share of sessions that are routed to the language model, those of which the session recommender is least "
        "sure; default 1.",
    )
    parser.add_argument(
        "--llm_threshold",
        type=float,
        help="In place of a budget: uncertainty, in nats, above which a session is routed to the language model.",
    )


if __name__ == "__main__":
    run_cli(main)
