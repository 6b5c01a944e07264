"""Delimited files with named columns."""

from pathlib import Path

import pytest

from datagen.csv import main
from llmgr_rec.errors import UserError
from tests.datagen.dumps import interactions, items, leftovers, write

LOG = "at,who,sku,stars\n20,u10,a,5\n10,u10,b,1\n20,u2,a,3\n20,u10,b,4\n"
SHOP = 'sku,name,kind,maker,text\na,"Tea, &quot;green&quot;","Food > Tea",Ito,"two\nlines"\nb,Cup,,,\n'
COLUMNS = ["--user_column=who", "--item_column=sku", "--time_column=at"]
TEXTS = ["--title_column=name", "--category_column=kind", "--brand_column=maker", "--description_column=text"]


def _run(tmp_path: Path, log: Path, *options: str) -> None:
    main(["--interactions", str(log), *COLUMNS, "--output", str(tmp_path / "out"), *options])


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


def test_item_column_of_another_name(tmp_path: Path) -> None:
    shop = write(tmp_path / "shop.csv", SHOP.replace("sku,", "product,"))
    log = write(tmp_path / "log.csv", LOG)
    _run(tmp_path, log, "--items", str(shop), "--items_id_column=product", "--title_column=name")
    assert [row["title"] for row in items(tmp_path / "out")] == ['Tea, "green"', "Cup"]


def test_min_rating(tmp_path: Path) -> None:
    _run(tmp_path, write(tmp_path / "log.csv", LOG), "--rating_column=stars", "--min_rating=4")
    assert interactions(tmp_path / "out") == [("u10", "a", 20), ("u10", "b", 20)]


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("2024-01-31T12:00:00Z", 1706702400000),
        ("2024-01-31 12:00:00.25", 1706702400250),
        ("2024-01-31T12:00:00+02:00", 1706695200000),
        ("2024-01-31", 1706659200000),
    ],
)
def test_dates_become_milliseconds_in_utc(
    tmp_path: Path, text: str, milliseconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    _run(tmp_path, write(tmp_path / "log.csv", f"at,who,sku\n{text},u,a\n"))
    assert interactions(tmp_path / "out") == [("u", "a", milliseconds)]


def test_large_times_are_kept_exactly(tmp_path: Path) -> None:
    _run(tmp_path, write(tmp_path / "log.csv", "at,who,sku\n1706702400123456789,u,a\n1706702400123456788,u,b\n"))
    assert interactions(tmp_path / "out") == [("u", "b", 1706702400123456788), ("u", "a", 1706702400123456789)]


def test_times_with_fractions_keep_their_order(tmp_path: Path) -> None:
    _run(tmp_path, write(tmp_path / "log.csv", "at,who,sku\n45321.75,u,a\n45321.5,u,b\n45322,u,c\n"))
    assert interactions(tmp_path / "out") == [("u", "b", 45321500000), ("u", "a", 45321750000), ("u", "c", 45322000000)]


def test_blank_lines_before_the_header_are_passed_over(tmp_path: Path) -> None:
    shop = write(tmp_path / "shop.csv", "\n \n" + SHOP)
    _run(tmp_path, write(tmp_path / "log.csv", "\n" + LOG), "--items", str(shop), *TEXTS)
    assert [row["item_id"] for row in items(tmp_path / "out")] == ["a", "b"]
    assert len(interactions(tmp_path / "out")) == 4


def test_ids_lose_the_same_blanks_in_both_files(tmp_path: Path) -> None:
    shop = write(tmp_path / "shop.csv", SHOP)
    log = write(tmp_path / "log.csv", "at,who,sku\n1,u ,a\t\n2,\tu, b\n")
    _run(tmp_path, log, "--items", str(shop), *TEXTS)
    assert interactions(tmp_path / "out") == [("u", "a", 1), ("u", "b", 2)]
    assert len(items(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("log", "options", "message"),
    [
        (LOG.replace("who", "whom"), [], r"log\.csv has no column 'who' \(--user_column\), .*, did you mean whom\?"),
        (LOG, ["--delimiter=;"], r"has no column 'who' .* --delimiter is wrong; known: at,who"),
        (LOG, ["--delimiter=ab"], r"--delimiter 'ab' is not one character"),
        (LOG, ["--min_rating=3"], r"--min_rating and --rating_column require each other"),
        (LOG, ["--title_column=name"], r"these options need --items"),
        (LOG + ",u,a,1\n", [], r"log\.csv: row 5: at is not a number"),
        (LOG + "inf,u,a,1\n", [], r"log\.csv: row 5: at is not a number"),
        (LOG + "1e30,u,a,1\n", [], r"log\.csv: Conversion Error"),
        (LOG + "1,,a,1\n", [], r"log\.csv: row 5: who is missing or empty"),
        (LOG + "1,u,a\n", [], r"log\.csv: line 6: Expected Number of Columns: 4 Found: 3"),
        (LOG + '1,u,"a,3\n', [], r"log\.csv: line 6: Value with unterminated quote found"),
        ("at,who,sku\n2024-01-31,u,a\nlater,u,b\n", [], r"log\.csv: row 2: at is not a date like 2024"),
        ("at,who,sku\n5,u,a\n2024-01-31,u,b\n", [], r"log\.csv: row 2: at is not a number"),
        ("at,who,sku,at\n", [], r"column 'at' occurs twice"),
        ("at,who,sku,Who\n", [], r"column 'who' occurs twice"),
        ("at,who,sku\r1,u,a\r2,u,b\r", [], r"log\.csv: line 1: .*; end each line with a line feed"),
        ("at,who,sku\n", [], r"nothing to convert: the file has no rows"),
        ("", [], r"log\.csv is empty"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(tmp_path: Path, log: str, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        _run(tmp_path, write(tmp_path / "log.csv", log), *options)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path, "log.csv") == []


def test_bad_catalog_is_named(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", LOG)
    shop = write(tmp_path / "shop.csv", SHOP + ",Nothing,,,\n")
    with pytest.raises(UserError, match=r"shop\.csv: row 3: the item id is missing"):
        _run(tmp_path, log, "--items", str(shop), *TEXTS)
    with pytest.raises(UserError, match=r"shop\.csv has no column 'nme' \(--title_column\), .*, did you mean name\?"):
        _run(tmp_path, log, "--items", str(shop), "--title_column=nme")
    write(shop, "sku,name\na,caf\u00e9\n", "latin-1")
    with pytest.raises(UserError, match=r"shop\.csv: line 2: not utf-8 encoded"):
        _run(tmp_path, log, "--items", str(shop), "--title_column=name")
    assert leftovers(tmp_path, "log.csv", "shop.csv") == []


def test_unknown_option_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean user_column\?"):
        _run(tmp_path, write(tmp_path / "log.csv", LOG), "--user_colum=x")
