"""Converts MovieLens dumps: ml-100k, ml-1m and ml-10m, ml-20m to ml-latest, and RecBole's atomic files.

    python -m datagen.movielens --input ml-1m --output data/ml-1m
    python -m datagen.movielens --output data/ml-100k          # the copy in the installed wheel `recbole`

Every rating becomes an interaction. The title includes the year; the genres become the category.
"""

import csv
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from datagen.output import describe_output
from llmgr_rec.cli import make_parser, parse_args, run_cli
from llmgr_rec.errors import UserError
from llmgr_rec.first_and_last_line import print_result, print_start
from llmgr_rec.paths import LocalPath

if TYPE_CHECKING:
    from datagen.conversion import Conversion, Item

    Reader = Callable[[Conversion, Path, float | None], None]

_WHEEL = "recbole"
_GENRES_100K = (
    "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|Film-Noir|Horror|Musical|"
    "Mystery|Romance|Sci-Fi|Thriller|War|Western"
)
"""Meaning of the flags in u.item, in order."""
_NO_GENRES = "(no genres listed)"
_EXPECTED = "u.data and u.item, ratings.dat and movies.dat, ratings.csv and movies.csv, or NAME.inter and NAME.item"


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and converts."""
    parser = make_parser(
        "datagen.movielens",
        "Converts a MovieLens dump to interactions.parquet and items.parquet.",
        "--output movielens",
    )
    parser.add_argument(
        "--input",
        type=LocalPath,
        default=_WHEEL,
        help=f"folder with {_EXPECTED}; recbole: ml-100k of the wheel",
    )
    parser.add_argument("--output", type=LocalPath, required=True, help="output folder, must not exist or be empty")
    parser.add_argument("--min_rating", type=float | None, default=None, help="drop lower ratings")
    args = parse_args(parser, argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print_start("datagen.movielens", [args.input], args.output)
    convert(args.input, args.output, args.min_rating)
    print_result("datagen.movielens", describe_output(args.output), args.output)


def convert(source: str | Path, output: str | Path, min_rating: float | None = None) -> None:
    """Converts a dump.

    Args:
        source: Folder of the dump, or "recbole" for the copy in the wheel.
        output: Output folder.
        min_rating: Drop lower ratings.

    Raises:
        UserError: The dump is missing or damaged, or `output` is not empty.
    """
    from datagen.reuse import convert_once

    folder = Path(source)
    if str(source) == _WHEEL and not folder.is_dir():
        folder = wheel_folder()
    if not folder.is_dir():
        raise UserError(f"--input {folder} is not a folder; give one with {_EXPECTED}")
    read = _format_of(folder)
    # Which of them are read depends on the format.
    sources = sorted(path for path in folder.iterdir() if path.is_file())
    convert_once(output, sources, {"min_rating": min_rating}, partial(_convert, read, folder, output, min_rating))


def _convert(read: "Reader", folder: Path, output: str | Path, min_rating: float | None) -> None:
    from datagen.conversion import conversion

    with conversion(output) as work:
        read(work, folder, min_rating)


def wheel_folder() -> Path:
    """Folder of ml-100k in the installed wheel `recbole`, found without importing the package.

    Raises:
        UserError: The wheel is not installed, or has no ml-100k.
    """
    from importlib.util import find_spec

    spec = find_spec(_WHEEL)
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        folder = Path(place) / "dataset_example" / "ml-100k"
        if (folder / "ml-100k.inter").is_file():
            return folder
    state = (
        f"the package {_WHEEL} at {places[0]} has no dataset_example/ml-100k"
        if places
        else f"{_WHEEL} is not installed"
    )
    raise UserError(f"{state}; pip install --no-deps recbole==1.2.1, or give a MovieLens folder with --input")


def _format_of(folder: Path) -> "Reader":
    for marker, read in (("u.data", _read_100k), ("ratings.dat", _read_dat), ("ratings.csv", _read_csv)):
        if (folder / marker).is_file():
            return read
    atomic = sorted(path.name for path in folder.glob("*.inter"))
    if len(atomic) == 1:
        return _read_atomic
    found = f"several .inter files ({', '.join(atomic)})" if atomic else "none of the expected files"
    raise UserError(f"--input {folder} has {found}; it must have {_EXPECTED}")


def _read_100k(work: "Conversion", folder: Path, min_rating: float | None) -> None:
    _read_ratings(work, folder / "u.data", "\t", header=False, min_rating=min_rating)
    films = _films_100k(_item_file(folder, "u.item"))
    work.read_items(folder / "u.item", films)


def _films_100k(path: Path) -> Iterator["Item"]:
    names = _GENRES_100K.split("|")
    for number, fields in _fields(path, "|", 5 + len(names)):
        flags = fields[5:]
        if set(flags) - {"0", "1"}:
            raise UserError(f"{path}: line {number}: a genre flag is not 0 or 1; download the file again")
        genres = [genre for genre, flag in zip(names, flags, strict=True) if flag == "1"]
        yield {"item_id": fields[0], "title": fields[1], "category": ", ".join(genres)}


def _read_dat(work: "Conversion", folder: Path, min_rating: float | None) -> None:
    _read_ratings(work, folder / "ratings.dat", "::", header=False, min_rating=min_rating)
    path = _item_file(folder, "movies.dat")
    work.read_items(path, (_film(*fields) for _, fields in _fields(path, "::", 3)))


def _read_csv(work: "Conversion", folder: Path, min_rating: float | None) -> None:
    _read_ratings(work, folder / "ratings.csv", ",", header=True, min_rating=min_rating)
    path = _item_file(folder, "movies.csv")
    work.read_items(path, _films_csv(path))


def _films_csv(path: Path) -> Iterator["Item"]:
    from datagen.sources import read_header, read_lines, require_columns

    require_columns(path, read_header(path, ","), {"MovieLens movies.csv": "movieId", "its titles": "title"})
    rows = csv.DictReader(line for _, line in read_lines(path, "utf-8-sig"))
    for row in rows:
        if None in row or None in row.values():
            raise UserError(
                f"{path}: line {rows.line_num}: the number of fields differs from the header; correct the line"
            )
        yield _film(row["movieId"], row["title"], row.get("genres") or "")


def _read_atomic(work: "Conversion", folder: Path, min_rating: float | None) -> None:
    from datagen.sources import delimited_sql, read_header, read_lines, require_columns

    clicks = next(iter(folder.glob("*.inter")))
    columns = _atomic_columns(read_header(clicks, "\t"))
    require_columns(clicks, columns, {f"RecBole {name}": name for name in ("user_id", "item_id", "timestamp")})
    rated = min_rating is not None
    if rated:
        require_columns(clicks, columns, {"--min_rating": "rating"})
    table = delimited_sql(clicks, columns, "\t", header=True)
    fields = {"user_id": "user_id", "item_id": "item_id", "time": "timestamp"} | ({"rating": "rating"} if rated else {})
    work.read_interactions(clicks, table, fields, min_rating)

    items = _item_file(folder, clicks.with_suffix(".item").name)
    names = _atomic_columns(read_header(items, "\t"))
    require_columns(items, names, {"RecBole item_id": "item_id"})
    lines = read_lines(items)
    next(lines)
    work.read_items(items, (_atomic_film(names, line, f"{items}: line {number}") for number, line in lines))


def _atomic_columns(header: list[str]) -> list[str]:
    """Column names without their RecBole types: movie_title for `movie_title:token_seq`."""
    return [name.split(":")[0] for name in header]


def _atomic_film(names: list[str], line: str, where: str) -> "Item":
    fields = line.split("\t")
    if len(fields) != len(names):
        raise UserError(f"{where}: {len(fields)} fields, but the header has {len(names)}; correct the line")
    row = dict(zip(names, fields, strict=True))
    title = row.get("movie_title") or row.get("title") or ""
    year = row.get("release_year", "").strip()
    # The film without a name has its title as year. Films for video have "V" as year, and the year in the title.
    if year and year != title.strip():
        title = f"{title} ({year})"
    genres = row.get("class") or row.get("genre") or row.get("genres") or ""
    # Tokens are separated by spaces; "(no genres listed)" is the only MovieLens genre that contains one.
    category = None if genres.strip() == _NO_GENRES else ", ".join(genres.split())
    return {"item_id": row["item_id"], "title": title, "category": category}


def _film(item_id: str, title: str, genres: str) -> "Item":
    category = None if genres.strip() == _NO_GENRES else ", ".join(genres.split("|"))
    return {"item_id": item_id, "title": title, "category": category}


def _read_ratings(work: "Conversion", path: Path, delimiter: str, *, header: bool, min_rating: float | None) -> None:
    from datagen.sources import delimited_sql, read_header, require_columns

    columns = ["userId", "movieId", "rating", "timestamp"]
    if header:
        present = read_header(path, delimiter)
        require_columns(path, present, {f"MovieLens {name}": name for name in columns})
        columns = present
    table = delimited_sql(path, columns, delimiter, header=header)
    names = {"user_id": "userId", "item_id": "movieId", "time": "timestamp", "rating": "rating"}
    work.read_interactions(path, table, names, min_rating)


def _item_file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} is missing, which has the titles; unpack the whole dump")
    return path


def _fields(path: Path, delimiter: str, count: int) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields of a file. The old dumps are Latin-1, ml-10m is UTF-8."""
    from datagen.sources import read_lines

    try:
        path.read_bytes().decode("utf-8")
        encoding = "utf-8"
    except UnicodeDecodeError:
        encoding = "latin-1"
    for number, line in read_lines(path, encoding):
        fields = line.split(delimiter)
        if len(fields) != count:
            raise UserError(f"{path}: line {number}: {len(fields)} fields instead of {count}; download the file again")
        yield number, fields


if __name__ == "__main__":
    run_cli(main)
