r"""Converts delimited text with a header line, or JSON lines; the columns are named on the command line.

    python -m datagen.csv --interactions log.csv --user_column user --item_column sku --time_column at \
        --items products.csv --title_column name --output data/shop
    python -m datagen.csv --sessions today.csv --user_column user --item_column sku --time_column at --output data/today

`--sessions` writes sessions to score. It reads ids and times as `--interactions` does.

Times are numbers or dates, see `datagen.times`. If any number has a fraction, all are converted to millionths. Dates
become microseconds since 1970 (UTC).
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datagen.output import describe_output
from llmgr_rec.cli import make_parser, parse_args, run_cli
from llmgr_rec.data.missing_values import MISSING_VALUES
from llmgr_rec.errors import UserError
from llmgr_rec.first_and_last_line import print_result, print_start
from llmgr_rec.paths import LocalPath

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from datagen.conversion import Conversion
    from datagen.delimited import DelimitedFile
    from datagen.json_lines import JsonLinesFile

_TEXTS = ("title", "category", "brand", "description")


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and converts."""
    parser = make_parser(
        "datagen.csv",
        "Converts delimited text or JSON lines to interactions.parquet and items.parquet, or to sessions.",
        "--interactions log.csv --user_column user --item_column item --time_column time --output raw",
    )
    parser.add_argument(
        "--interactions", type=LocalPath, default=None, help="log with a header line, or with a JSON object a line"
    )
    parser.add_argument(
        "--sessions",
        type=LocalPath,
        default=None,
        help="log of new sessions; writes sessions.parquet for llmgr_rec.score. Give this or --interactions",
    )
    parser.add_argument("--user_column", type=str, required=True, help="user or session column")
    parser.add_argument("--item_column", type=str, required=True, help="item column, in both files")
    parser.add_argument(
        "--time_column",
        type=str | None,
        default=None,
        help="time column: numbers, or ISO dates; with --sessions it may be left out, and rows keep their order",
    )
    parser.add_argument(
        "--time_format",
        type=str,
        default="auto",
        help="how times are read: auto (numbers or ISO dates), number (numbers of one unit, whatever their size), mdy "
        "(01/31/2024), dmy (31.01.2024), or a pattern such as '%d %b %Y %H:%M'",
    )
    parser.add_argument("--rating_column", type=str | None, default=None, help="rating column, for --min_rating")
    parser.add_argument("--min_rating", type=float | None, default=None, help="drop lower ratings")
    parser.add_argument("--items", type=LocalPath, default=None, help="item file; may be the same file")
    parser.add_argument(
        "--items_id_column", type=str | None, default=None, help="item column of --items, if it has another name"
    )
    for name in _TEXTS:
        parser.add_argument(f"--{name}_column", type=str | None, default=None, help=f"{name} column of --items")
    _add_reading_options(parser)
    parser.add_argument("--output", type=LocalPath, required=True, help="output folder, must not exist or be empty")
    args = parse_args(parser, argv).as_dict()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print_start("datagen.csv", [args["interactions"], args["sessions"], args["items"]], args["output"])
    _convert(args)
    print_result("datagen.csv", describe_output(args["output"]), args["output"])


def _add_reading_options(parser: "ArgumentParser") -> None:
    """Adds the options that say how files are read and which rows count."""
    parser.add_argument(
        "--delimiter",
        type=str,
        default="auto",
        help="one character; 'tab' for a tab; auto: the one of , ; tab and | that the header has",
    )
    parser.add_argument(
        "--encoding", type=str | None, default=None, help="such as cp1252; default: UTF-8, or by the byte order mark"
    )
    parser.add_argument(
        "--bad_rows",
        type=Literal["error", "drop"],
        default="error",
        help="rows without user, item or time, or with a wrong number of fields: stop, or drop and count them",
    )
    parser.add_argument(
        "--missing_values",
        type=str,
        default=",".join(MISSING_VALUES),
        help="words that stand for a missing value, separated by commas",
    )
    parser.add_argument(
        "--duplicates",
        type=Literal["drop", "keep"],
        default="drop",
        help="rows of --sessions that are equal in user, item and time: drop all but the first, or keep them",
    )


def _convert(args: dict[str, Any]) -> None:
    from datagen.reuse import convert_once
    from datagen.sources import require_file
    from datagen.times import check_time_format

    texts = {name: args[f"{name}_column"] for name in _TEXTS if args[f"{name}_column"] is not None}
    _check_options(args, texts)
    check_time_format(args["time_format"])
    option = "interactions" if args["sessions"] is None else "sessions"
    log = require_file(args[option], f"--{option}")
    items = require_file(args["items"], "--items") if args["items"] is not None else None
    options = {
        name: value for name, value in args.items() if name not in ("output", "interactions", "sessions", "items")
    }
    sources = [log, *([] if items is None else [items])]
    convert_once(
        args["output"], sources, {"of": option, **options}, lambda: _convert_files(args, option, log, items, texts)
    )


def _convert_files(args: dict[str, Any], option: str, log: Path, items: Path | None, texts: dict[str, str]) -> None:
    from datagen.conversion import Conversion, conversion

    missing_values = frozenset(word.strip() for word in args["missing_values"].split(","))
    # Without times, equal rows may be clicks at different times.
    drop = args["duplicates"] == "drop" and args["time_column"] is not None
    write = Conversion.write if option == "interactions" else partial(Conversion.write_sessions, drop_duplicates=drop)
    with conversion(args["output"], args["bad_rows"], missing_values, write) as work:
        _read_log(work, log, args)
        if items is not None:
            columns = {"item_id": args["items_id_column"] or args["item_column"]} | texts
            options = {"item_id": "items_id_column"} | {name: f"{name}_column" for name in texts}
            wanted = {f"--{options[name]}": column for name, column in columns.items()}
            work.read_item_file(_open(items, wanted, args), columns)


def _check_options(args: dict[str, Any], texts: dict[str, str]) -> None:
    if (args["interactions"] is None) == (args["sessions"] is None):
        raise UserError("give exactly one of --interactions and --sessions")
    if args["interactions"] is not None and args["time_column"] is None:
        raise UserError("--interactions needs --time_column; name the column with the times of the clicks")
    if args["sessions"] is not None and (texts or args["items"] is not None):
        raise UserError("--sessions takes no item file, because the run has the items; remove --items and its columns")
    if (args["min_rating"] is None) != (args["rating_column"] is None):
        raise UserError("--min_rating and --rating_column require each other; give both or neither")
    if (args["items"] is None) != (not texts):
        raise UserError(
            "--items needs at least one of --title_column, --category_column, --brand_column, "
            "--description_column, and these options need --items"
        )


def _read_log(work: "Conversion", path: Path, args: dict[str, Any]) -> None:
    columns = {"user_id": "user", "item_id": "item", "time": "time", "rating": "rating"}
    names = {name: args[f"{column}_column"] for name, column in columns.items() if args[f"{column}_column"] is not None}
    file = _open(path, {f"--{columns[name]}_column": column for name, column in names.items()}, args)
    work.read_interactions(path, file.read(list(names.values())), names, args["min_rating"], args["time_format"])


def _open(path: Path, wanted: dict[str, str], args: dict[str, Any]) -> "DelimitedFile | JsonLinesFile":
    from datagen.delimited import DelimitedFile
    from datagen.json_lines import JsonLinesFile, is_json_lines
    from datagen.text_file import encoding_name

    delimiter = {"tab": "\t", "\\t": "\t", "auto": None}.get(args["delimiter"], args["delimiter"])
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '\r\n"' or ord(delimiter) > 127):
        raise UserError(f"--delimiter {args['delimiter']!r} is not one ASCII character; use 'tab' for a tab")
    encoding = encoding_name(args["encoding"])
    if is_json_lines(path, encoding):
        return JsonLinesFile(path, wanted, encoding)
    return DelimitedFile(path, wanted, delimiter, encoding)


if __name__ == "__main__":
    run_cli(main)
