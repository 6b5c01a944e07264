"""Bad input of prepare: one clear line each, exit code 2, nothing left behind."""

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmgr_rec.data.preparation.load import split_column
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.errors import UserError
from llmgr_rec.prepare import main
from tests.data.prepare_inputs import write_items


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Good inputs, ten users with six clicks each, in two row groups."""
    write(tmp_path)
    write_items(tmp_path / "items.parquet", [f"i{n}" for n in range(8)])
    return tmp_path


def write(folder: Path, **columns: Any) -> None:
    """interactions.parquet with some columns replaced; None leaves one out."""
    table = {
        "user_id": [f"u{n // 6}" for n in range(60)],
        "item_id": [f"i{n % 6}" for n in range(60)],
        "timestamp": list(range(60)),
    }
    kept = {name: values for name, values in (table | columns).items() if values is not None}
    pq.write_table(pa.table(kept), folder / "interactions.parquet", row_group_size=40)


def refused(folder: Path, *words: str, **paths: str) -> str:
    """The message of a run that must fail, after checking that it leaves nothing behind."""
    before = sorted(folder.rglob("*"))
    options = {
        "interactions": str(folder / "interactions.parquet"),
        "items": str(folder / "items.parquet"),
        "output": str(folder / "dataset"),
    } | paths
    arguments = [word for name, value in options.items() if value for word in (f"--{name}", value)]
    with pytest.raises(UserError) as caught:
        main([*arguments, *words])
    assert sorted(folder.rglob("*")) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_names(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message, message


def test_good_input_passes(folder: Path) -> None:
    main(
        [
            "--interactions",
            f"{folder}/interactions.parquet",
            "--items",
            f"{folder}/items.parquet",
            "--output",
            f"{folder}/o",
        ]
    )
    assert (folder / "o" / "manifest.json").is_file()


def test_missing_file(folder: Path) -> None:
    message = refused(folder, interactions=str(folder / "absent.parquet"))
    assert_names(message, "absent.parquet", "does not exist", "--interactions")
    (folder / "empty").mkdir()
    assert_names(refused(folder, items=str(folder / "empty")), "empty", "no *.parquet file", "--items")


@pytest.mark.parametrize("column", ["user_id", "item_id", "timestamp"])
def test_missing_column(folder: Path, column: str) -> None:
    write(folder, **{column: None}, other=[1] * 60)
    assert_names(refused(folder), "interactions.parquet", f"column {column} is missing", "other", "rename")


@pytest.mark.parametrize(
    ("column", "values", "needed"),
    [
        ("user_id", [True] * 60, "string, int64 or whole floats"),
        ("item_id", [[1]] * 60, "string, int64 or whole floats"),
        ("timestamp", ["2020-01-01"] * 60, "int64, float or a timestamp"),
    ],
)
def test_wrong_type(folder: Path, column: str, values: list[Any], needed: str) -> None:
    write(folder, **{column: values})
    assert_names(refused(folder), "interactions.parquet", f"column {column} is", needed, "cast it")


@pytest.mark.parametrize("column", ["user_id", "item_id", "timestamp"])
def test_null(folder: Path, column: str) -> None:
    values = pq.read_table(folder / "interactions.parquet")[column].to_pylist()
    write(folder, **{column: [None if n in (45, 50) else value for n, value in enumerate(values)]})
    assert_names(refused(folder), "interactions.parquet, row group 1, row 45", f"column {column} is null (2 in all)")


@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_empty_id(folder: Path, column: str) -> None:
    values = pq.read_table(folder / "interactions.parquet")[column].to_pylist()
    write(folder, **{column: ["" if n in (45, 50) else value for n, value in enumerate(values)]})
    assert_names(refused(folder), "interactions.parquet, row group 1, row 45", f"column {column} is empty (2 in all)")


def test_null_item_id_in_the_catalog(folder: Path) -> None:
    write_items(folder / "items.parquet", ["i0", None])
    assert_names(refused(folder), "items.parquet, row group 0, row 1", "column item_id is null")


@pytest.mark.parametrize(("column", "values"), [("user_id", [-1] + [1] * 59)])
def test_negative_value(folder: Path, column: str, values: list[int]) -> None:
    write(folder, **{column: values})
    assert_names(refused(folder), "interactions.parquet, row group 0, row 0", f"column {column} is negative (1 rows")


def test_no_rows(folder: Path) -> None:
    write(
        folder, user_id=pa.array([], pa.string()), item_id=pa.array([], pa.string()), timestamp=pa.array([], pa.int64())
    )
    assert_names(refused(folder), "interactions.parquet", "has no rows")


def test_core_leaves_nothing(folder: Path) -> None:
    assert_names(
        refused(folder, "--min_interactions", "7"), "k-core filter removes all 60 clicks", "lower --min_interactions"
    )


def test_split_leaves_nothing(folder: Path) -> None:
    write(folder, user_id=[f"u{n // 2}" for n in range(60)])
    message = refused(folder, "--min_interactions", "0")
    assert_names(message, "leave_one_out gives no train rows", "another --split")
    # The filter is off, so it cannot be the reason.
    assert "--min_interactions" not in message
    write(folder, timestamp=[5] * 60)
    assert_names(refused(folder, "--split", "temporal"), "temporal leaves a split empty", "--test_share")


def test_duplicate_item_ids(folder: Path) -> None:
    write_items(folder / "items.parquet", [f"i{n}" for n in range(8)] + ["i3", "i2", "i3"])
    message = refused(folder)
    assert_names(message, "items.parquet, row group 0, row 8", "item_id 'i3'", "row 3", "2 ids", "keep one row")


def test_items_missing_from_the_catalog(folder: Path) -> None:
    write_items(folder / "items.parquet", ["i0", "i1", "i2"])
    message = refused(folder)
    assert_names(message, "items.parquet", "30 clicks", "first is 'i3'", "--missing_items drop", "keep")
    write_items(folder / "items.parquet", ["x"])
    assert_names(refused(folder), "only 0 of 6 item ids", "the clicks have 'i0', 'i1', 'i2', the item file has 'x'")
    for choice in ("drop", "keep"):
        assert_names(refused(folder, "--missing_items", choice), "no click in the input names an item", "only 0 of 6")


@pytest.mark.parametrize("name", ["interactions", "items"])
def test_truncated_file(folder: Path, name: str) -> None:
    path = folder / f"{name}.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    assert_names(refused(folder), f"{name}.parquet", "not a complete Parquet file", "download it again")


def test_not_parquet(folder: Path) -> None:
    (folder / "interactions.parquet").write_text("no table\n" * 10)
    assert_names(refused(folder), "interactions.parquet", "not a complete Parquet file")


def test_delimited_text_is_answered_with_the_command_that_converts_it(folder: Path) -> None:
    (folder / "clicks").mkdir()
    log = folder / "clicks" / "log 1.csv"
    log.write_text("visit;sku;at\n1;a;2\n")
    command = f"convert it with: python -m datagen.csv --interactions '{log}' --user_column USER"
    message = refused(folder, interactions=str(log))
    assert_names(message, "is delimited text (columns: visit, sku, at), not Parquet", command)
    assert_names(refused(folder, interactions=str(log.parent)), "no *.parquet file (skipped log 1.csv", command)
    (folder / "shop.tsv.gz").write_bytes(gzip.compress(b"sku\tname\na\tTea\n"))
    message = refused(folder, items=str(folder / "shop.tsv.gz"))
    assert_names(message, "(columns: sku, name)", "--interactions LOG --items ", "shop.tsv.gz --title_column TITLE")


def test_renamed_columns(folder: Path) -> None:
    table = pq.read_table(folder / "interactions.parquet")
    plain = pq.read_table(folder / "items.parquet")
    for day, rows in (("dt=1", table.slice(0, 30)), ("dt=2", table.slice(30))):
        (folder / "log" / day).mkdir(parents=True)
        pq.write_table(rows.rename_columns(["session_id", "sku", "ts"]), folder / "log" / day / "a.parquet")
    pq.write_table(plain.rename_columns(["sku", "name"]), folder / "shop.parquet")
    log, shop = str(folder / "log"), str(folder / "shop.parquet")
    message = refused(folder, interactions=log)
    assert_names(message, "item_id is missing (it has session_id, sku, ts, dt)", "by --rename COLUMN=item_id")
    assert_names(refused(folder, "--rename", "sku=item", interactions=log), "did you mean item_id?")
    assert_names(refused(folder, "--rename", "sk=item_id", interactions=log), "column sk, which is to be item_id, is")
    assert_names(refused(folder, "--rename", "sku", interactions=log), "give YOURS=NAME, such as sku=user_id")
    rename = ["--rename", "sku=item_id,ts=timestamp"]
    assert_names(refused(folder, *rename, interactions=log, items=shop), "by --rename_items COLUMN=item_id")
    outputs = []
    for files in ([], ["--interactions", log, *rename, "--items", shop, "--rename_items", "sku=item_id,name=title"]):
        outputs.append(folder / f"set-{len(outputs)}")
        words = ["--interactions", str(folder / "interactions.parquet"), "--items", str(folder / "items.parquet")]
        main([*(files or words), "--output", str(outputs[-1])])
    first, second = (json.loads((output / "manifest.json").read_text())["files"] for output in outputs)
    assert first == second
    main(
        ["--interactions", log, "--rename", "sku=item_id,dt=timestamp", "--duplicates", "keep", "--output", f"{log}-3"]
    )


def test_json_and_empty_files_are_answered_with_what_to_do(folder: Path) -> None:
    log = folder / "log.json"
    log.write_text('{"user_id": 1, "item_id": 2}\n')
    command = f"is JSON, not Parquet; convert it with: python -m datagen.csv --interactions {log} --user_column USER"
    assert_names(refused(folder, interactions=str(log)), "log.json (--interactions) " + command)
    log.write_bytes(b"")
    assert_names(refused(folder, interactions=str(log)), "log.json (--interactions) is empty; write or download it")


def test_leave_one_out_of_short_sessions_says_what_it_holds_out(folder: Path) -> None:
    write(folder, user_id=[f"u{n // 3}" for n in range(60)], item_id=[f"i{n % 3}" for n in range(60)])
    assert_names(refused(folder, "--min_interactions", "1"), "gives no train rows", "sessions of three train nothing")


def test_damaged_data_page(folder: Path) -> None:
    path = folder / "interactions.parquet"
    write(folder, user_id=[f"user {n * 7919 % 10007}" for n in range(60)])
    content = bytearray(path.read_bytes())
    content[4:150] = b"\xff" * 146
    path.write_bytes(bytes(content))
    assert_names(refused(folder), "reading", "interactions.parquet", "damaged")


def test_damaged_name_of_a_column(folder: Path) -> None:
    path = folder / "interactions.parquet"
    write(folder, note=["x"] * 60)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"note", b"n\xecte"))
    assert_names(refused(folder), "interactions.parquet", "not a complete Parquet file")


def test_files_of_a_folder_that_differ(folder: Path) -> None:
    (folder / "many").mkdir()
    for name, times in (("a", [datetime(2024, 1, 1)] * 2), ("b", [1, 2])):
        table = pa.table({"user_id": ["u", "v"], "item_id": ["i0", "i1"], "timestamp": times})
        pq.write_table(table, folder / "many" / f"{name}.parquet")
    message = refused(folder, interactions=str(folder / "many"))
    assert_names(message, "b.parquet", "column timestamp is int64, but timestamp", "a.parquet")


def test_columns_that_differ_only_in_case(folder: Path) -> None:
    table = pq.read_table(folder / "interactions.parquet")
    pq.write_table(table.add_column(0, "Item_ID", table["item_id"]), folder / "interactions.parquet")
    assert_names(refused(folder), "interactions.parquet", "columns item_id and Item_ID differ only in case")


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.date32()])
def test_a_time_far_in_the_future(folder: Path, kind: pa.DataType) -> None:
    times = [datetime(2024, 1, 1)] * 59 + [datetime(9999, 12, 31)]
    write(folder, timestamp=pa.array(times, pa.timestamp("us")).cast(kind))
    assert_names(
        refused(folder), "row group 1, row 59", "column timestamp", "not between the years 1678 and 2261 (1 rows"
    )


def test_output_not_empty(folder: Path) -> None:
    (folder / "dataset").mkdir()
    (folder / "dataset" / "mine.txt").write_text("mine")
    assert_names(refused(folder), "dataset exists and is not an empty folder", "--output")
    assert (folder / "dataset" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--max_length", "0"], ["--max_length is 0", "1 or more"]),
        (["--min_interactions", "-1"], ["--min_interactions is -1", "0"]),
        (["--min_session_length", "-1"], ["--min_session_length is -1"]),
        (["--valid_share", "1.5"], ["--valid_share is 1.5"]),
        (["--split", "temporal", "--test_share", "0"], ["--test_share above 0"]),
        (["--split", "temporal", "--test_share", "0.6", "--valid_share", "0.6"], ["below 1"]),
        (["--split_column", "x"], ["--split predefined"]),
        (["--split", "predefined", "--split_column", "x", "--split_prefix"], ["not both"]),
        (["--prefix_augmentation", "all"], ["training clicks", "leave_one_out"]),
        (["--memory_gb", "0"], ["--memory_gb"]),
        (["--min_interaction", "3"], ["--min_interaction", "did you mean min_interactions?"]),
        (["--split", "leave_two_out"], ["leave_two_out", "temporal"]),
        (["--max_length", "many"], ["max_length", "many"]),
    ],
)
def test_bad_option(folder: Path, words: list[str], parts: list[str]) -> None:
    assert_names(refused(folder, *words), *parts)


def test_neither_or_both_inputs(folder: Path) -> None:
    assert_names(refused(folder, interactions=""), "exactly one of --interactions and --sessions")
    both = refused(folder, sessions=str(folder / "interactions.parquet"))
    assert_names(both, "exactly one of --interactions and --sessions")


def test_predefined_split_of_unknown_words(folder: Path) -> None:
    message = refused(folder, "--split", "predefined")
    assert_names(message, "interactions.parquet, row group 0, row 0", "column user_id", "train_", "--split_column")
    write(folder, split=["train"] * 41 + ["tset"] * 19)
    message = refused(folder, "--split", "predefined")
    assert_names(message, "row group 1, row 41", "column split is not one of train, valid", "19 clicks")
    message = refused(folder, "--split", "predefined", "--split_column", "part")
    assert_names(message, "column part is missing")


def test_predefined_split_against_time(folder: Path) -> None:
    write(folder, split=["test", *["train"] * 4, "test"] * 10)
    message = refused(folder, "--split", "predefined")
    assert_names(message, "contradicts the timestamps", "session 'u")


def test_prefixes_of_test_rows_that_begin_in_training(folder: Path) -> None:
    write(folder, timestamp=[n % 6 * 10 + n // 6 for n in range(60)])
    message = refused(folder, "--split", "temporal", "--prefix_augmentation", "all")
    assert_names(message, "--prefix_augmentation all", "earlier split")


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"session_id": ["a", "b", "a"]}, ["row 2", "session_id 'a'", "more than once"]),
        ({"items": [["i0"], ["i0", None], ["i1"]]}, ["row 1", "column items holds a null item"]),
        ({"items": [["i0"], None, ["i1"]]}, ["row 1", "column items is null"]),
        ({"items": ["i0", "i1", "i2"]}, ["column items is string", "a list of string, int64 or whole floats"]),
        ({"items": [[0.5], [2.0], [3.0]]}, ["row 0", "items is a float, but no exact integer (1 rows"]),
        ({"items": [[], [], []]}, ["column items is list<element: null>", "a list"]),
    ],
)
def test_bad_sessions(folder: Path, columns: dict[str, Any], parts: list[str]) -> None:
    table = {"session_id": ["a", "b", "c"], "items": [["i0", "i1"]] * 3} | columns
    pq.write_table(pa.table(table), folder / "sessions.parquet")
    message = refused(folder, interactions="", sessions=str(folder / "sessions.parquet"))
    assert_names(message, "sessions.parquet", *parts)


def test_a_prepared_split_is_no_input(folder: Path) -> None:
    schema = pa.schema([("session_id", pa.string()), ("items", pa.list_(pa.int64()))])
    marked = schema.with_metadata({"llmgr_rec.items": "index"})
    pq.write_table(pa.table({"session_id": ["a"], "items": [[0, 1]]}, schema=marked), folder / "sessions.parquet")
    message = refused(folder, interactions="", sessions=str(folder / "sessions.parquet"))
    assert_names(message, "sessions.parquet", "split of a prepared data set")


def test_temporal_split_of_sessions_needs_a_timestamp(folder: Path) -> None:
    pq.write_table(pa.table({"session_id": ["a"], "items": [["i0"]]}), folder / "sessions.parquet")
    message = refused(folder, "--split", "temporal", interactions="", sessions=str(folder / "sessions.parquet"))
    assert_names(message, "column timestamp is missing")


def test_split_column_is_read_for_the_predefined_split_alone() -> None:
    settings = PrepareSettings(items="", output="")
    assert split_column(settings) is None
    assert split_column(replace(settings, split="predefined")) == "split"
    assert split_column(replace(settings, split="predefined", split_prefix=True)) is None


def test_the_program_exits_with_2_and_one_line(folder: Path) -> None:
    words = ["--interactions", "absent", "--items", str(folder / "items.parquet"), "--output", str(folder / "o")]
    run = subprocess.run(
        [sys.executable, "-m", "llmgr_rec.prepare", *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("error: absent does not exist")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--output", "--temp_folder"])
def test_a_folder_below_a_file_is_refused(tmp_path: Path, option: str) -> None:
    (tmp_path / "file").touch()
    words = ["--interactions", "absent", "--items", "absent", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=f"{option} .*file is a file; give the path of a folder"):
        main([*words, option, str(tmp_path / "file" / "below")])
