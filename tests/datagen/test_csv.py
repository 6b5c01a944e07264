"""Delimited files with named columns, as programs and people write them."""

import bz2
import gzip
import logging
import lzma
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datagen.csv import main
from datagen.delimited import DelimitedFile
from datagen.sessions import session_batches
from datagen.text_file import BadLine
from llmgr_rec.errors import UserError
from tests.datagen.dumps import interactions, items, leftovers, write

LOG = "at,who,sku,stars\n20,u10,a,5\n10,u10,b,1\n20,u2,a,3\n20,u10,b,4\n"
SHOP = 'sku,name,kind,maker,text\na,"Tea, &quot;green&quot;","Food > Tea",Ito,"two\nlines"\nb,Cup,,,\n'
COLUMNS = ["--user_column=who", "--item_column=sku", "--time_column=at"]
TEXTS = ["--title_column=name", "--category_column=kind", "--brand_column=maker", "--description_column=text"]
# What every spelling of the same three clicks must give.
CLICKS = "at,who,sku\n3,u,é\n1,u,b\n2,v,c\n"
ROWS = [("u", "b", 1), ("u", "é", 3), ("v", "c", 2)]


def _run(tmp_path: Path, log: Path, *options: str) -> None:
    main(["--interactions", str(log), *COLUMNS, "--output", str(tmp_path / "out"), *options])


def _times(tmp_path: Path, *times: str, options: tuple[str, ...] = ()) -> list[int]:
    """What the times of one user become, in the order of their rows."""
    folder = tmp_path / f"times-{len(list(tmp_path.iterdir()))}"
    log = write(folder / "log.csv", "at,who,sku\n" + "".join(f'"{t}",u,i{n}\n' for n, t in enumerate(times)))
    _run(folder, log, *options)
    return [time for _, _, time in sorted(interactions(folder / "out"), key=lambda row: int(row[1][1:]))]


def test_log_and_catalog(tmp_path: Path) -> None:
    shop = write(tmp_path / "shop.csv", SHOP)
    _run(tmp_path, write(tmp_path / "log.csv", LOG), "--items", str(shop), *TEXTS)
    # Oldest first inside a user, ties in file order, u2 before u10.
    assert interactions(tmp_path / "out") == [("u2", "a", 20), ("u10", "b", 10), ("u10", "a", 20), ("u10", "b", 20)]
    assert items(tmp_path / "out") == [
        {"item_id": "a", "title": 'Tea, "green"', "category": "Food > Tea", "brand": "Ito", "description": "two lines"},
        {"item_id": "b", "title": "Cup", "category": None, "brand": None, "description": None},
    ]


def test_log_alone_gives_items_without_text(tmp_path: Path) -> None:
    _run(tmp_path, write(tmp_path / "log.csv.gz", LOG))
    assert [(row["item_id"], row["title"]) for row in items(tmp_path / "out")] == [("a", None), ("b", None)]


def test_one_file_for_both_and_another_delimiter(tmp_path: Path) -> None:
    text = "\ufeff" + "who\tat\tsku\tname\nu\t1\ta\tRed tea\nu\t2\ta\tRed tea, later\nu\t3\tb\tCup\n"
    log = write(tmp_path / "log.tsv", text)
    _run(tmp_path, log, "--items", str(log), "--title_column=name", "--delimiter=tab")
    assert [(row["item_id"], row["title"]) for row in items(tmp_path / "out")] == [("a", "Red tea"), ("b", "Cup")]
    assert [row[2] for row in interactions(tmp_path / "out")] == [1, 2, 3]


def test_item_column_of_another_name_and_min_rating(tmp_path: Path) -> None:
    shop = write(tmp_path / "shop.csv", SHOP.replace("sku,", "product,"))
    log = write(tmp_path / "log.csv", LOG)
    more = ["--items_id_column=product", "--title_column=name", "--rating_column=stars", "--min_rating=4"]
    _run(tmp_path, log, "--items", str(shop), *more)
    assert [row["title"] for row in items(tmp_path / "out")] == ['Tea, "green"', "Cup"]
    assert interactions(tmp_path / "out") == [("u10", "a", 20), ("u10", "b", 20)]
    log = write(tmp_path / "log.csv", LOG + "30,u2,b,\n")
    with pytest.raises(UserError, match="line 6: stars is missing; correct"):
        _run(tmp_path / "bad", log, *more[2:])


def test_json_lines(tmp_path: Path) -> None:
    log = write(
        tmp_path / "log.jsonl.gz",
        '{"who": "u", "sku": 7, "at": {"ms": 1700000000001}}\n\n'
        '{"at": {"ms": 1700000000002}, "sku": 8.0, "who": "u"}\n',
    )
    shop = write(
        tmp_path / "shop.json",
        '{"sku": 7, "name": ["Tea", "\\ud83d"], "kind": ["Food", ["Drinks", "Tea"]], "text": "<p>a &amp; b</p>"}\n'
        '{"sku": "8", "kind": [], "maker": null, "text": ["one", "two"]}\n{"sku": 8}\n',
    )
    columns = ["--user_column=who", "--item_column=sku", "--time_column=at.ms"]
    main(["--interactions", str(log), *columns, "--items", str(shop), *TEXTS, "--output", str(tmp_path / "out")])
    assert interactions(tmp_path / "out") == [("u", "7", 1700000000001), ("u", "8", 1700000000002)]
    none = dict.fromkeys(["title", "brand", "description", "category"])
    assert items(tmp_path / "out") == [
        none | {"item_id": "7", "title": "Tea \ufffd", "category": "Food | Drinks > Tea", "description": "a & b"},
        none | {"item_id": "8", "description": "one two"},
    ]
    bad = write(
        tmp_path / "bad.jsonl", '{"who": "u", "sku": 7, "at": 1}\n[1]\n{"who": {}, "sku": [1], "at": 2}\n{"who"\n'
    )
    with pytest.raises(UserError, match="line 2: is not a JSON object; line 3: has an object as who; line 4: is not"):
        _run(tmp_path / "bad", bad)
    with pytest.raises(UserError, match=r"has no field 'when' \(--time_column\); known: who, sku, at"):
        _run(tmp_path / "bad", log, "--time_column=when")
    with pytest.raises(UserError, match="is one JSON array; write each object on a line of its own"):
        _run(tmp_path / "bad", write(tmp_path / "list.json", '[\n{"who": 1}\n]\n'))


def test_bad_rows_are_shown_by_kind(tmp_path: Path) -> None:
    rows = [f"31.12.2024,{'' if place < 5 else 'u'},a\n" for place in range(9)]
    log = write(tmp_path / "log.csv", "at,who,sku\n" + "".join(rows))
    with pytest.raises(UserError, match="9 bad rows of 9 in all: who is missing: 5, at is no") as error:
        _run(tmp_path / "bad", log)
    assert "line 2: who is missing; line 3: who is missing; line 7: '31.12.2024' of at is no" in str(error.value)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (CLICKS.encode("utf-8-sig"), []),
        (CLICKS.encode("utf-16"), []),
        (b"\xfe\xff" + CLICKS.encode("utf-16-be"), []),
        (CLICKS.encode("cp1252"), ["--encoding=cp1252"]),
        (CLICKS.replace("\n", "\r\n").encode(), []),
        (CLICKS.replace("\n", "\r").encode(), []),
        (CLICKS.rstrip().encode(), []),
        (CLICKS.replace("\n", "\n\n").encode(), []),
        (("\n \n" + CLICKS).encode(), []),
        (CLICKS.replace(",", ";").encode(), []),
        (CLICKS.replace(",", "|").encode(), []),
        (b"sep=;\r\n" + CLICKS.replace(",", ";").encode(), []),
        (CLICKS.replace(",", "~").encode(), ["--delimiter=~"]),
        (gzip.compress(CLICKS.encode(), mtime=0), []),
        (bz2.compress(CLICKS.encode()), []),
        (lzma.compress(CLICKS.encode()), []),
        (pa.compress(CLICKS.encode(), "zstd", asbytes=True), []),
        # The index that pandas writes has an empty name.
        (b",at,who,sku\n0,3,u,\xc3\xa9\n1,1,u,b\n2,2,v,c\n", []),
        (CLICKS.replace("\n", ",\n").encode(), []),
        (b"at,who,sku\n" + CLICKS.replace("\n", ",\n").encode().split(b"\n", 1)[1], []),
        (b"at,who,sku,\n" + CLICKS.encode().split(b"\n", 1)[1], []),
        (b'at,who,sku,"a\nb"\n3, "u", "\xc3\xa9",\n1,u\xc2\xa0,\tb,\n2," v",c,"x\ny"\n', []),
        (b"AT,at,who,sku\n0,3,u,\xc3\xa9\n0,1,u,b\n0,2,v,c\n", []),
    ],
)
def test_every_way_to_write_a_table(tmp_path: Path, data: bytes, options: list[str]) -> None:
    log = tmp_path / "log.csv"
    log.write_bytes(data)
    _run(tmp_path, log, *options)
    assert interactions(tmp_path / "out") == ROWS


@pytest.mark.parametrize(
    "name", ["log[1].csv", "log?.csv", "log*.csv", "a'b$$\\.csv", "dt=2026-11-01/filename=x/log.csv"]
)
def test_a_path_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    for other in ("log1.csv", "log2.csv"):
        write(tmp_path / other, LOG)
    _run(tmp_path, write(tmp_path / name, CLICKS))
    assert interactions(tmp_path / "out") == ROWS


def test_an_output_may_look_like_an_address_of_duckdb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("md:out", "sqlite:out", ":memory:"):
        main(["--interactions", str(write(tmp_path / "log.csv", CLICKS)), *COLUMNS, "--output", name])
        assert interactions(tmp_path / name) == ROWS


def test_columns_may_have_any_name(tmp_path: Path) -> None:
    names = ['it"s', "FILE_ROW_NUMBER", "filename", "place", "line"]
    log = write(tmp_path / "log.csv", '"it""s",FILE_ROW_NUMBER,filename,place,line\n1,u,a,9,9\n0,u,b,9,9\n')
    for user, item, time in ((1, 2, 0), (3, 4, 0), (2, 0, 1)):
        options = [f"--user_column={names[user]}", f"--item_column={names[item]}", f"--time_column={names[time]}"]
        if (user, item, time) == (2, 0, 1):
            with pytest.raises(UserError, match=r"'u' of FILE_ROW_NUMBER is not a number or a date"):
                main(["--interactions", str(log), *options, "--output", str(tmp_path / "bad")])
        else:
            main(["--interactions", str(log), *options, "--output", str(tmp_path / names[user])])
    assert interactions(tmp_path / "FILE_ROW_NUMBER") == [("u", "b", 0), ("u", "a", 1)]


def test_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    noon = 1706702400 * 10**6
    dates = {
        "2024-01-31T12:00:00Z": noon,
        "2024-01-31 12:00:00.250001": noon + 250_001,
        "2024-01-31 12:00:00,25": noon + 250_000,
        "2024-01-31T12:00:00+02:00": noon - 7200 * 10**6,
        "2024-01-31T12:00:00 -0500": noon + 5 * 3600 * 10**6,
        "2024-01-31 12:00:00 UTC": noon,
        "2024/1/31 12:00": noon,
        "2024-01-31": noon - 43200 * 10**6,
        "1969-12-31T23:59:59.5Z": -500_000,
    }
    assert _times(tmp_path, *dates) == list(dates.values())
    zones = {
        "2024-07-01 12:00:00 Europe/London": 11,
        "2024-07-01 12:00:00 GMT": 12,
        "2024-07-01 12:00:00 UTC+2": 10,
        "2024-07-01 12:00:00 America/New_York": 16,
    }
    assert _times(tmp_path, *zones) == [(1719792000 + 3600 * hour) * 10**6 for hour in zones.values()]
    # DuckDB reads the summer time of London as that of Bangladesh.
    for zone in ("BST", "ist", "CET", "PST"):
        with pytest.raises(UserError, match=f"'2024-07-01 12:00:00 {zone}' of at .*its time zone is ambiguous"):
            _times(tmp_path, *zones, f"2024-07-01 12:00:00 {zone}")
    # More digits than microseconds.
    assert _times(tmp_path, "2024-01-31T12:00:00.123456789Z", "2024-01-31T12:00:00Z") == [
        noon * 1000 + 123456789,
        noon * 1000,
    ]
    assert _times(tmp_path, "1706702400123456789", "1706702400123456788") == [1706702400123456789, 1706702400123456788]
    assert _times(tmp_path, "45321.75", "45321.5", "45322", "-2.5") == [45321750000, 45321500000, 45322000000, -2500000]
    assert _times(tmp_path, "1706702400.123456", "1706702400.123457") == [noon + 123456, noon + 123457]
    assert _times(tmp_path, "1706702400.000000002", "1706702400.5") == [noon * 1000 + 2, noon * 1000 + 500_000_000]
    # Fractions that int64 cannot hold beside the other times are rounded.
    assert _times(tmp_path, "1706702400000000000.25", "3.25", "5") == [1706702400000000000, 3, 5]
    assert _times(tmp_path, "9007199254740", "3.25") == [9007199254740000000, 3250000]
    assert _times(tmp_path, "90071992547409", "3.0625") == [90071992547409000, 3063]
    assert _times(tmp_path, "1706702400.0", "-3", "+4", "1.7e9") == [1706702400, -3, 4, 1700000000]


def test_times_of_other_forms(tmp_path: Path) -> None:
    noon = 1706702400 * 10**6
    days = ("--time_format=mdy",)
    assert _times(tmp_path, "01/31/2024 12:00", "1/31/24", "01-31-2024 12:00:00.5 ", options=days) == [
        noon,
        noon - 43200 * 10**6,
        noon + 500_000,
    ]
    assert _times(tmp_path, "01/31/2024 12:00:01 PM", "01/31/2024 1:00 AM", options=days) == [
        noon + 10**6,
        noon - 11 * 3600 * 10**6,
    ]
    assert _times(tmp_path, "31.01.2024 12:00:00", "31.01.2024", options=("--time_format=dmy",)) == [
        noon,
        noon - 43200 * 10**6,
    ]
    pattern = ("--time_format=%a %b %d %H:%M:%S %z %Y",)
    assert _times(tmp_path, "Wed Jan 31 12:00:00 +0200 2024", options=pattern) == [noon - 7200 * 10**6]
    assert _times(tmp_path, "20240131T120000Z", options=("--time_format=%Y%m%dT%H%M%SZ",)) == [noon]
    pattern = ("--time_format=%a %b %d %H:%M:%S %Z %Y",)
    assert _times(tmp_path, "Wed Jan 31 12:00:00 UTC 2024", options=pattern) == [noon]
    with pytest.raises(UserError, match="its time zone is ambiguous"):
        _times(tmp_path, "Mon Jul 01 12:00:00 BST 2024", options=pattern)
    for wrong in ("us", "%Q", "%"):
        with pytest.raises(UserError, match=rf"^--time_format '{wrong}'.*give auto, number, mdy"):
            _times(tmp_path, "1", options=(f"--time_format={wrong}",))


def test_units_are_not_mixed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    mixed = ["1706702400", "1706702399500", "1706702400250"]
    assert _times(tmp_path, *mixed) == [1706702400000, 1706702399500, 1706702400250]
    assert (
        "at: times are 1 in seconds and 2 in milliseconds since 1970; all are converted to milliseconds" in caplog.text
    )
    assert _times(tmp_path, "1706702400.5", "1706702400250") == [1706702400500000, 1706702400250000]
    assert _times(tmp_path, *mixed, "5", options=("--time_format=number",)) == [*map(int, mixed), 5]
    with pytest.raises(
        UserError, match=r"log\.csv: at: times are 1 in seconds and 2 in milliseconds since 1970, and 1 fit neither"
    ):
        _times(tmp_path, *mixed, "5")
    assert _times(tmp_path, "1.70671E+12", "1.70671E+12") == [1706710000000] * 2
    assert "2 times are in scientific notation" in caplog.text


def test_ids_written_as_floats_match(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log = write(tmp_path / "log.csv", "at,who,sku\n1,1.0,12.0\n2,1,7\n3,1, 0012\n")
    _run(
        tmp_path, log, "--items", str(write(tmp_path / "shop.csv", "sku,name\n12,Tea\n7.0,Cup\n0012,Can\n")), *TEXTS[:1]
    )
    assert interactions(tmp_path / "out") == [("1", "12", 1), ("1", "7", 2), ("1", "0012", 3)]
    assert [row["title"] for row in items(tmp_path / "out")] == ["Tea", "Cup", "Can"]
    assert "log.csv: sku: 1 ids such as 12.0 are read as 12" in caplog.text
    for lost in ("1.23457E+12", "1e+16", "9007199254740992.0"):
        log = write(tmp_path / "log.csv", f"at,who,sku\n1,u,{lost}\n")
        with pytest.raises(UserError, match=r"line 2: '.*' of sku was written as a float and has lost digits"):
            _run(tmp_path / "lost", log)


def test_few_matching_ids_are_a_warning_and_none_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = write(tmp_path / "log.csv", "at,who,sku\n1,u,a\n2,u,b1\n3,u,b2\n4,u,b3\n5,u,b4\n")
    shop = write(tmp_path / "shop.csv", "sku,name\na,Tea\nB1,Cup\nB2,Can\n")
    _run(tmp_path, log, "--items", str(shop), "--title_column=name")
    assert (
        "only 1 of 5 item ids of the clicks are in the item file (20%): the clicks have 'b1', 'b2', 'b3', "
        "the item file has 'B1', 'B2'; the others become items without text"
    ) in caplog.text
    write(shop, "sku,name\nA,Tea\n")
    with pytest.raises(
        UserError, match=r"only 0 of 5 item ids .* the item file has 'A'; check that the files belong together"
    ):
        _run(tmp_path / "none", log, "--items", str(shop), "--title_column=name")


def test_words_for_missing_values(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    words = ["nan", "NULL", "None", r"\N", "", " "]
    log = write(
        tmp_path / "log.csv", "at,who,sku\n" + "".join(f"1,u,{w}\n2,{w},a\n{w},u,a\n" for w in words) + "9,u,a\n"
    )
    shop = write(tmp_path / "shop.csv", "sku,name\na,NULL\n" + "".join(f"{w},Tea\n" for w in words) + "None1,None\n")
    with pytest.raises(
        UserError, match=r"line 2: sku is missing; line 3: who is missing; line 4: at is missing \(18 bad"
    ):
        _run(tmp_path, log)
    _run(tmp_path, log, "--items", str(shop), "--title_column=name", "--bad_rows=drop")
    assert interactions(tmp_path / "out") == [("u", "a", 9)]
    assert [(row["item_id"], row["title"]) for row in items(tmp_path / "out")] == [("a", None), ("None1", None)]
    counts = (
        "bad rows dropped: 18 of 19 (who is missing: 6, sku is missing: 6, at is missing: 6); the first are line 2: sku"
    )
    assert counts in caplog.text
    assert "shop.csv: bad rows dropped: 6 of 8 (sku is missing: 6); the first are line 3: sku is missing" in caplog.text
    assert "shop.csv: read as missing, because they are words such as NULL or nan: 2 name" in caplog.text
    log = write(tmp_path / "log.csv", "at,who,sku\n1,nan,n/a\n2,None,-\n")
    _run(tmp_path / "own", log, "--missing_values=-", "--bad_rows=drop")
    assert interactions(tmp_path / "own/out") == [("nan", "n/a", 1)]
    log = write(tmp_path / "log.csv", "at,who,sku\n1,NA,a\n2,NA,undefined\n3,NAM,a\n4,-,a\n")
    _run(tmp_path / "suspect", log)
    rows = [("-", "a", 4), ("NA", "a", 1), ("NA", "undefined", 2), ("NAM", "a", 3)]
    assert interactions(tmp_path / "suspect/out") == rows
    assert "who is a word that may stand for a missing value in 3 rows ('-', 'NA'); it is read as an id" in caplog.text
    assert "sku is a word that may stand for a missing value in 1 rows ('undefined')" in caplog.text


def test_bad_rows_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = (
        'at,who,sku,note\n1,u,a,"two\nlines"\n2,u,b\n3,u,c,x,y\nlater,u,d,\n\n5,u,e,"stray " quote\n6,u,f,\n'
        '7,u,g,"never closed\n8,u,h,\n9,,i,\n'
    )
    log = write(tmp_path / "log.csv", text)
    with pytest.raises(UserError) as caught:
        _run(tmp_path, log)
    assert str(caught.value).endswith(
        "log.csv: line 4: has 3 fields, but the header has 4; line 5: has 5 fields, but the header has 4; "
        "line 6: 'later' of at is not a number or a date like 2024-01-31 (6 bad rows of 9 in all); correct such rows, "
        "or drop them with --bad_rows drop, or name the form of the dates with --time_format, such as dmy for "
        "31.01.2024 or mdy for 01/31/2024"
    )
    _run(tmp_path, log, "--bad_rows=drop")
    assert [row[1] for row in interactions(tmp_path / "out")] == ["a", "f", "h"]
    assert "log.csv: bad rows dropped: 6 of 9 (" in caplog.text
    assert "has 3 fields, but the header has 4: 1, " in caplog.text
    assert "others: 1); the first are line 4: has 3 fields" in caplog.text
    with pytest.raises(UserError, match=r"all 1 rows are bad: line 2: 'x' of at is not a number"):
        _run(tmp_path / "all", write(log, "at,who,sku\nx,u,a\n"), "--bad_rows=drop")


def _parsed(path: Path) -> list[tuple[int, ...]]:
    """Line numbers with values, without white space around them, or with what is wrong."""
    found: list[tuple[int, ...]] = []
    for part in DelimitedFile(path, {"a": "at", "b": "who", "c": "sku"}, ",").read(["sku", "at", "who"]):
        if isinstance(part, BadLine):
            found.append((part.line, part.problem))
        else:
            columns = ([value.strip() for value in column.to_pylist()] for column in part.columns)
            found += zip(part.lines, *columns, strict=True)
    return sorted(found)


def test_plain_blocks_equal_quoted_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datagen.delimited.BLOCK_BYTES", 64)
    lines = [f"{n},user {n % 7},i{n},{'x' * (n % 50)}" for n in range(400)]
    lines[100:100] = ["", "1,2", 'a,"b\nc",d,"e ""f"""', "1,2,3,4,,"]
    path = write(tmp_path / "log.csv", "at,who,sku,note\r\n" + "\r\n".join(lines))
    fast = _parsed(path)
    monkeypatch.setattr(DelimitedFile, "_parse_plain", lambda *_: None)
    assert fast == _parsed(path)
    assert len(fast) == 403
    assert fast[100:103] == [
        (103, "has 2 fields, but the header has 4"),
        (104, "d", "a", "b\nc"),
        (106, "3", "1", "2"),
    ]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text('ab",\n\r \x00é', max_size=12), max_size=12))
def test_any_text_is_read_the_same_in_plain_and_quoted_blocks(pieces: list[str]) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = write(Path(folder) / "log.csv", "at,who,sku\n" + "1,u,a\n".join(pieces))
        patch.setattr("datagen.delimited.BLOCK_BYTES", 8)
        fast = _parsed(path)
        patch.setattr(DelimitedFile, "_parse_plain", lambda *_: None)
        assert fast == _parsed(path)
        patch.setattr("datagen.delimited.BLOCK_BYTES", 1 << 20)
        assert fast == _parsed(path)


@pytest.mark.parametrize(
    ("log", "options", "message"),
    [
        (LOG.replace("who", "whom"), [], r"log\.csv has no column 'who' \(--user_column\), .*, did you mean whom\?"),
        (LOG, ["--delimiter=;"], r"has no column 'who' .* --delimiter is wrong; known: at,who"),
        (LOG, ["--delimiter=ab"], r"--delimiter 'ab' is not one ASCII character"),
        (LOG, ["--encoding=utf-99"], r"--encoding 'utf-99' is unknown"),
        (LOG, ["--encoding=utf-16"], r"log\.csv is not utf-16 text; name its encoding"),
        (LOG, ["--bad_rows=skip"], r"bad_rows.*skip"),
        (LOG, ["--min_rating=3"], r"--min_rating and --rating_column require each other"),
        (LOG, ["--min_rating=9", "--rating_column=stars"], r"all 4 rows are below --min_rating 9"),
        (LOG, ["--title_column=name"], r"these options need --items"),
        (LOG, ["--sessions=log.csv"], r"exactly one of --interactions and --sessions"),
        (LOG + ",u,a,1\n", [], r"log\.csv: line 6: at is missing; correct"),
        (LOG + "inf,u,a,1\n", [], r"log\.csv: line 6: 'inf' of at is not a number"),
        (LOG + "1e30,u,a,1\n", [], r"log\.csv: line 6: '1e30' of at is not a number"),
        (LOG + '"1,234",u,a,1\n', [], r"log\.csv: line 6: '1,234' of at is not a number"),
        (LOG + "1,,a,1\n", [], r"log\.csv: line 6: who is missing"),
        (LOG + "1,u,a\n", [], r"log\.csv: line 6: has 3 fields, but the header has 4"),
        (LOG + '1,u,"a,3\n', [], r"log\.csv: line 6: opens a quote that is never closed"),
        (LOG + '1,u,"a"b,3\n', [], r"log\.csv: line 6: has a quote inside a quoted field"),
        ("at,who,sku\n2024-01-31,u,a\nlater,u,b\n", [], r"log\.csv: line 3: 'later' of at is not a date like 2024"),
        ("at,who,sku\n01/31/2024,u,a\n", [], r"line 2: '01/31/2024' of at .* --time_format, such as dmy .* or mdy"),
        ("at,who,sku\n12-11-10,u,a\n", [], r"line 2: '12-11-10' of at is not "),
        ("at,who,sku\n5,u,a\n2024-01-31,u,b\n", [], r"log\.csv: line 3: '2024-01-31' of at is not a number"),
        ("at,who,sku,at\n1,u,a,2\n", [], r"column 'at' occurs twice"),
        ("at,who,sku\n", [], r"nothing to convert: the file has no rows"),
        ("", [], r"log\.csv is empty"),
        ("\n\n", [], r"log\.csv is empty"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(tmp_path: Path, log: str, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        _run(tmp_path, write(tmp_path / "log.csv", log), *options)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path, "log.csv") == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"at,who,sku\n1,u,a\n2,u,\xe9\n", r"log\.csv: line 3 is not UTF-8 text; .* --encoding, such as cp1252"),
        (CLICKS.encode("utf-16-le"), r"UTF-16 without a byte order mark; pass --encoding utf-16-le"),
        (gzip.compress(CLICKS.encode(), mtime=0)[:-9], r"log\.csv: damaged compressed data"),
        (b"PK\x03\x04rest", r"is a zip archive or an Excel workbook"),
        (b"PAR1rest", r"is a Parquet file; give it to python -m llmgr_rec\.prepare"),
    ],
)
def test_bytes_that_are_no_text_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "log.csv").write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        _run(tmp_path, tmp_path / "log.csv")
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path, "log.csv") == []


def test_bad_catalog_is_named(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", LOG)
    shop = write(tmp_path / "shop.csv", SHOP + ",Nothing,,,\n")
    with pytest.raises(UserError, match=r"shop\.csv: line 5: sku is missing"):
        _run(tmp_path, log, "--items", str(shop), *TEXTS)
    with pytest.raises(UserError, match=r"shop\.csv has no column 'nme' \(--title_column\), .*, did you mean name\?"):
        _run(tmp_path, log, "--items", str(shop), "--title_column=nme")
    write(shop, "sku,name\na,Tea\n1e+20,Cup\n")
    with pytest.raises(UserError, match=r"shop\.csv: item id '1e\+20' was written as a float"):
        _run(tmp_path, log, "--items", str(shop), "--title_column=name")
    assert leftovers(tmp_path, "log.csv", "shop.csv") == []


def test_unknown_option_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean user_column\?"):
        _run(tmp_path, write(tmp_path / "log.csv", LOG), "--user_colum=x")


def test_sessions_may_continue_in_the_next_batch() -> None:
    table = pa.table({"number": [1, 1, 1, 2, 5, 5], "id": list("aaabcc"), "item": list("uvwxyz")})
    expected = [("a", ["u", "v", "w"]), ("b", ["x"]), ("c", ["y", "z"])]
    for size in range(1, 8):
        batches = session_batches(table.to_batches(max_chunksize=size))
        assert [tuple(row.values()) for batch in batches for row in batch.to_pylist()] == expected
    assert list(session_batches([])) == []


def test_sessions_are_read_as_the_log_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    times = ["2024-03-10T02:30:00", "2024-03-10T01:59:59.999999Z", "2024-03-10T03:00:00+02:00", "2024-03-10"]
    rows = "".join(f"{time},{user},{n}.0\n" for user in ("u9", "u10") for n, time in enumerate(times))
    log = write(tmp_path / "log.csv", "at,who,sku\n" + rows)
    _run(tmp_path, log)
    main(["--sessions", str(log), *COLUMNS, "--output", str(tmp_path / "new")])
    table = pq.read_table(tmp_path / "new")
    assert leftovers(tmp_path / "new", "sessions.parquet") == []
    assert table.to_pylist() == [{"session_id": user, "items": ["3", "2", "1", "0"]} for user in ("u9", "u10")]
    assert [row[1] for row in interactions(tmp_path / "out")] == ["3", "2", "1", "0"] * 2
    # Without times, rows keep their order.
    main(["--sessions", str(log), *COLUMNS[:2], "--output", str(tmp_path / "rows")])
    assert pq.read_table(tmp_path / "rows")["items"].to_pylist() == [["0", "1", "2", "3"]] * 2
    # Equal clicks are dropped, as in prepare.
    twice = write(tmp_path / "twice.csv", "at,who,sku\n1,u,a\n1,u,a\n1,u,b\n2,u,a\n")
    for choice, kept in (("drop", "aba"), ("keep", "aaba")):
        main(["--sessions", str(twice), *COLUMNS, "--output", str(tmp_path / choice), f"--duplicates={choice}"])
        assert pq.read_table(tmp_path / choice)["items"].to_pylist() == [list(kept)]
    with pytest.raises(UserError, match="--sessions takes no item file"):
        main(["--sessions", str(log), *COLUMNS, "--output", "o", "--items", str(log), "--title_column=at"])
