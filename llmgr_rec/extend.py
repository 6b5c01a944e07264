"""`python -m llmgr_rec.extend`: a trained run for the catalog of today, without training.

    python -m llmgr_rec.extend --run RUN --items items.parquet --output EXTENDED

docs/every-day.md says when.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmgr_rec.cli import add_code_argument, add_run_argument, make_parser, parse_args, run_cli
from llmgr_rec.comma_separated import split_list
from llmgr_rec.first_and_last_line import print_result, print_start
from llmgr_rec.library_imports import command_imports
from llmgr_rec.paths import StoragePath
from llmgr_rec.remote_path import as_path

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def main(argv: Sequence[str]) -> None:
    """Parses arguments and writes the extended run.

    Args:
        argv: Arguments of the command.

    Raises:
        UserError: The run has no complete model, an item is not usable, or the output cannot be written.
    """
    arguments = parse_args(_parser(), argv)

    with command_imports():
        from llmgr_rec.arrow_input import to_table
        from llmgr_rec.data.preparation.domain_inputs import paths_by_domain
        from llmgr_rec.storage.extended_run import extend_run

    run, output = as_path(arguments.run), as_path(arguments.output)
    # `arguments.items` is a method.
    file = str(arguments["items"])
    paths = paths_by_domain(file, "items")
    print_start("extend", [run, *paths.values()], output)
    tables = {
        domain: to_table(path, f"--items, domain {domain}" if domain else "--items") for domain, path in paths.items()
    }
    items = tables.get("", tables)
    mapping = extend_run(run, items, f"--items {file}", output, split_list(arguments.allow_code))
    print_result("extend", mapping.summary(), output)


def _parser() -> "ArgumentParser":
    parser = make_parser("llmgr_rec.extend")
    add_run_argument(parser)
    parser.add_argument(
        "--items",
        type=StoragePath,
        required=True,
        help="Parquet file or folder with the whole current catalog: item_id and, each optional, title, category, "
        "brand, description. Items of the run that it lacks are gone. For a run of several domains one of each, "
        "beauty=F,films=G, or one with full ids (beauty:B001).",
    )
    parser.add_argument("--output", type=StoragePath, required=True, help="Folder to write the extended run to.")
    add_code_argument(parser)
    return parser


if __name__ == "__main__":
    run_cli(main)
