"""`python -m llmgr_rec.export`: writes a trained model in another form.

    python -m llmgr_rec.export --run RUN --output model.pt2
    python -m llmgr_rec.export --run RUN --output SMALLER --table_dtype int8

The first is a session recommender as one program that runs without this package; the second is a run that all other
commands take, with its embedding tables in fewer bits. docs/export.md says how to use both.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmgr_rec.bounds import Bounds, check_options
from llmgr_rec.cli import add_code_argument, add_run_argument, make_parser, parse_args, run_cli
from llmgr_rec.comma_separated import split_list
from llmgr_rec.config import StageName, TableDType
from llmgr_rec.errors import UserError
from llmgr_rec.first_and_last_line import print_result, print_start
from llmgr_rec.library_imports import command_imports
from llmgr_rec.paths import StoragePath, is_remote
from llmgr_rec.remote_path import as_path

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

# Items of a list where --k does not say it.
_K = 20


def main(argv: Sequence[str]) -> None:
    """Parses arguments and writes the program and its catalog, or the run.

    Args:
        argv: Arguments of the command.

    Raises:
        UserError: The run has no complete model, its model has a language model, or the output cannot be written.
    """
    arguments = parse_args(_parser(), argv)
    check_options({"k": arguments.k}, {"k": Bounds(at_least=1, at_most=1_000_000)})
    if arguments.table_dtype:
        _write_run(arguments)
    else:
        _write_program(arguments)


def _write_run(arguments: "Namespace") -> None:
    if arguments.output.endswith(".pt2"):
        raise UserError(
            f"--output {arguments.output}: --table_dtype writes a folder, and a program has no tables; give the name "
            "of a folder, or leave --table_dtype out"
        )
    if arguments.k is not None:
        raise UserError("--k is for programs, whose lists have a fixed length; leave it out with --table_dtype")

    with command_imports():
        from llmgr_rec.storage.bundle_conversion import convert_run

    output, run = as_path(arguments.output), as_path(arguments.run)
    print_start("export", [run], output)
    size = convert_run(run, output, arguments.table_dtype, arguments.stage, split_list(arguments.allow_code))
    print_result("export", f"embedding tables of {arguments.table_dtype}, {size / 2**20:,.1f} MiB", output)


def _write_program(arguments: "Namespace") -> None:
    if is_remote(arguments.output):
        raise UserError(
            f"--output {arguments.output}: a program is written on this machine; give a local path and copy the files"
        )

    with command_imports():
        from llmgr_rec.scoring.program_export import check_output, write_program
        from llmgr_rec.storage.bundle import open_bundle

    output, run = Path(arguments.output), as_path(arguments.run)
    check_output(output)
    path = run / "export" / arguments.stage if arguments.stage else run
    files = open_bundle(path, split_list(arguments.allow_code))
    print_start("export", [files.path], output)
    written = write_program(files, output, arguments.k or _K)
    lists = f"lists of {written.k:,} of {written.num_items:,} items, whose ids are in {written.items}"
    print_result("export", lists, written.program)


def _parser() -> "ArgumentParser":
    parser = make_parser("llmgr_rec.export")
    add_run_argument(parser)
    parser.add_argument(
        "--output",
        type=StoragePath,
        required=True,
        help="Program to write, NAME.pt2; the item ids are written to NAME.items.parquet beside it. With "
        "--table_dtype, folder to create.",
    )
    parser.add_argument(
        "--table_dtype",
        type=TableDType,
        help="Write a run instead of a program: the same models with embedding tables in this number format, and "
        "without checkpoints.",
    )
    parser.add_argument("--k", type=int, help=f"Items per session of the program; default: {_K}.")
    parser.add_argument(
        "--stage",
        type=StageName,
        help="Stage whose model to use; default: the last complete one; with --table_dtype, all.",
    )
    add_code_argument(parser)
    return parser


if __name__ == "__main__":
    run_cli(main)
