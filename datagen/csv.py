r"""Converts delimited text files with a header line; the columns are named on the command line.

    python -m datagen.csv --interactions log.csv --user_column user --item_column sku --time_column at \
        --items products.csv --title_column name --output data/shop

Times are numbers in any unit, or ISO dates and times. If any number has a fraction, all are converted to millionths.
Dates are converted to milliseconds since 1970 (UTC).
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmgr_rec.cli import make_parser, parse_args, run_cli
from llmgr_rec.errors import UserError
from llmgr_rec.paths import LocalPath

if TYPE_CHECKING:
    from datagen.conversion import Conversion, Item

_TEXTS = ("title", "category", "brand", "description")


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and converts."""
    parser = make_parser("datagen.csv", "Converts delimited text to interactions.parquet and items.parquet.")
    parser.add_argument("--interactions", type=LocalPath, required=True, help="file with a header line, may be gzipped")
    parser.add_argument("--user_column", type=str, required=True, help="user or session column")
    parser.add_argument("--item_column", type=str, required=True, help="item column, in both files")
    parser.add_argument("--time_column", type=str, required=True, help="time column: numbers, or ISO dates")
    parser.add_argument("--rating_column", type=str | None, default=None, help="rating column, for --min_rating")
    parser.add_argument("--min_rating", type=float | None, default=None, help="drop lower ratings")
    parser.add_argument("--items", type=LocalPath, default=None, help="item file; may be the same file")
    parser.add_argument(
        "--items_id_column", type=str | None, default=None, help="item column of --items, if it has another name"
    )
    for name in _TEXTS:
        parser.add_argument(f"--{name}_column", type=str | None, default=None, help=f"{name} column of --items")
    parser.add_argument("--delimiter", type=str, default=",", help="one character; 'tab' for a tab")
    parser.add_argument("--output", type=LocalPath, required=True, help="output folder, must not exist or be empty")
    args = parse_args(parser, argv).as_dict()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _convert(args)


def _convert(args: dict[str, Any]) -> None:
    from datagen.conversion import conversion
    from datagen.sources import require_file

    if (args["min_rating"] is None) != (args["rating_column"] is None):
        raise UserError("--min_rating and --rating_column require each other; give both or neither")
    texts = {name: args[f"{name}_column"] for name in _TEXTS if args[f"{name}_column"] is not None}
    if (args["items"] is None) != (not texts):
        raise UserError(
            "--items needs at least one of --title_column, --category_column, --brand_column, "
            "--description_column, and these options need --items"
        )
    delimiter = {"tab": "\t", "\\t": "\t"}.get(args["delimiter"], args["delimiter"])
    if len(delimiter) != 1:
        raise UserError(f"--delimiter {args['delimiter']!r} is not one character; use 'tab' for a tab")
    interactions = require_file(args["interactions"], "--interactions")
    items = require_file(args["items"], "--items") if args["items"] is not None else None
    with conversion(args["output"]) as work:
        _read_interactions(work, interactions, delimiter, args)
        if items is not None:
            _read_items(work, items, delimiter, args["items_id_column"] or args["item_column"], texts)


def _read_interactions(work: "Conversion", path: Path, delimiter: str, args: dict[str, Any]) -> None:
    from datagen.sources import delimited_sql, read_header, require_columns

    options = ["user_column", "item_column", "time_column", "rating_column"]
    header = read_header(path, delimiter)
    require_columns(path, header, {f"--{option}": args[option] for option in options if args[option] is not None})
    table = delimited_sql(path, header, delimiter, header=True, quotes=True)
    user, item, time, rating = (args[option] for option in options)
    work.read_interactions(path, table, user, item, time, rating, args["min_rating"], dates=True)


def _read_items(work: "Conversion", path: Path, delimiter: str, item_column: str, texts: dict[str, str]) -> None:
    from datagen.sources import delimited_sql, identifier, read_header, require_columns

    header = read_header(path, delimiter)
    wanted = {"--items_id_column": item_column} | {f"--{name}_column": column for name, column in texts.items()}
    require_columns(path, header, wanted)
    columns = {"item_id": item_column} | texts
    selected = ", ".join(f"{identifier(column)} AS {name}" for name, column in columns.items())
    rows: Iterator[Item] = work.sql_rows(
        path, f"SELECT {selected} FROM {delimited_sql(path, header, delimiter, header=True, quotes=True)}"
    )
    work.read_items(path, rows)


if __name__ == "__main__":
    run_cli(main)
