"""Amazon review dumps of 2014, 2018 and 2023 (reviews and metadata of one category).

    python -m datagen.amazon --year 2014 --reviews reviews_Beauty_5.json.gz --meta meta_Beauty.json.gz --output beauty

Every review becomes an interaction. Timestamps are seconds since 1970 in 2014 and 2018, milliseconds in 2023. Items are
identified by asin in 2014 and 2018, by parent_asin in 2023.
"""

import ast
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datagen.output import describe_output
from llmgr_rec.cli import make_parser, parse_args, run_cli
from llmgr_rec.errors import UserError
from llmgr_rec.first_and_last_line import print_result, print_start
from llmgr_rec.paths import LocalPath

if TYPE_CHECKING:
    from datagen.conversion import Item


@dataclass(frozen=True)
class _Dump:
    """Field names of the dump of a year."""

    user: str
    item: str
    rating: str
    time: str


_OLD = _Dump(user="reviewerID", item="asin", rating="overall", time="unixReviewTime")
_DUMPS = {2014: _OLD, 2018: _OLD, 2023: _Dump(user="user_id", item="parent_asin", rating="rating", time="timestamp")}


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and converts."""
    parser = make_parser(
        "datagen.amazon",
        "Converts an Amazon review dump to interactions.parquet and items.parquet.",
        "--year 2014 --reviews reviews_Beauty_5.json.gz --meta meta_Beauty.json.gz --output beauty",
    )
    parser.add_argument("--year", type=int, required=True, help="release of the dump: 2014, 2018 or 2023")
    parser.add_argument(
        "--reviews", type=LocalPath, required=True, help="reviews, a JSON object per line, may be gzipped"
    )
    parser.add_argument("--meta", type=LocalPath, required=True, help="metadata of the same category, may be gzipped")
    parser.add_argument("--min_rating", type=float | None, default=None, help="drop lower ratings")
    parser.add_argument("--output", type=LocalPath, required=True, help="output folder, must not exist or be empty")
    args = parse_args(parser, argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print_start("datagen.amazon", [args.reviews, args.meta], args.output)
    convert(args.year, args.reviews, args.meta, args.output, args.min_rating)
    print_result("datagen.amazon", describe_output(args.output), args.output)


def convert(
    year: int, reviews: str | Path, meta: str | Path, output: str | Path, min_rating: float | None = None
) -> None:
    """Converts a dump.

    Args:
        year: Year of the release: 2014, 2018 or 2023.
        reviews: File with reviews.
        meta: File with metadata.
        output: Output folder.
        min_rating: Drop lower ratings.

    Raises:
        UserError: A file is missing, damaged or of another year, or `output` is not empty.
    """
    from datagen.reuse import convert_once
    from datagen.sources import require_file

    if year not in _DUMPS:
        raise UserError(f"--year is {year}; it must be one of {', '.join(map(str, _DUMPS))}")
    files = require_file(reviews, "--reviews"), require_file(meta, "--meta")
    options = {"year": year, "min_rating": min_rating}
    convert_once(output, files, options, partial(_convert, year, *files, output, min_rating))


def _convert(year: int, reviews_file: Path, meta_file: Path, output: str | Path, min_rating: float | None) -> None:
    from datagen.conversion import conversion
    from datagen.sources import json_sql

    dump = _DUMPS[year]
    with conversion(output) as work:
        table = json_sql(reviews_file, [dump.user, dump.item, dump.rating, dump.time])
        names = {"user_id": dump.user, "item_id": dump.item, "time": dump.time, "rating": dump.rating}
        work.read_interactions(reviews_file, table, names, min_rating)
        work.read_items(meta_file, _items(meta_file, year))


def _items(path: Path, year: int) -> Iterator["Item"]:
    from datagen.sources import read_lines

    item_field = _DUMPS[year].item
    for number, line in read_lines(path):
        record = _record(line, year, f"{path}: line {number}")
        if not record.get(item_field):
            raise UserError(f"{path}: line {number}: {item_field} is missing; is it the metadata of {year}?")
        yield {"item_id": str(record[item_field]), **_texts(record, year)}


def _record(line: str, year: int, where: str) -> dict[str, Any]:
    """Parses a record. The 2014 metadata are Python literals, which `literal_eval` parses without executing code."""
    try:
        record = ast.literal_eval(line) if year == 2014 else json.loads(line)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        kind = "a Python literal (the format of the 2014 metadata)" if year == 2014 else "a JSON object"
        raise UserError(f"{where} is not {kind}; check --year, or download the file again") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} is a {type(record).__name__}, not an object; check the file")
    return record


def _texts(record: dict[str, Any], year: int) -> "Item":
    title = record.get("title")
    if isinstance(title, str) and "getTime" in title:
        # Some titles of 2018 are JavaScript of the web page.
        title = None
    brand = record.get("brand")
    if year == 2014:
        category = _alternatives(record.get("categories"))
    elif year == 2018:
        category = _path(record.get("category"))
    else:
        category = _path(record.get("categories")) or record.get("main_category")
        details = record.get("details")
        brand = record.get("store") or (details.get("Brand") if isinstance(details, dict) else None)
    return {"title": title, "category": category, "brand": brand, "description": _joined(record.get("description"))}


def _alternatives(paths: Any) -> str | None:
    """Alternative category paths: "Beauty > Hair Care | Beauty > Tools"."""
    if not isinstance(paths, list):
        return None
    return " | ".join(dict.fromkeys(path for path in map(_path, paths) if path)) or None


def _path(levels: Any) -> str | None:
    """One category path: "Beauty > Hair Care"."""
    from datagen.sources import clean_text

    if not isinstance(levels, list):
        return None
    return " > ".join(level for level in map(clean_text, levels) if level) or None


def _joined(text: Any) -> str | None:
    """A description, which is a string or a list of paragraphs."""
    if isinstance(text, list):
        return " ".join(part for part in text if isinstance(part, str)) or None
    return text if isinstance(text, str) else None


if __name__ == "__main__":
    run_cli(main)
