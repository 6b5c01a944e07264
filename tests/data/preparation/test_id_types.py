"""Ids that one file has as integers and another as floats or text, and times that are floats."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmgr_rec.errors import UserError
from tests.data.prepare_inputs import Prepared, prepare, write_items

INT, FLOAT = pa.int64(), pa.float64()


def _prepared(folder: Path, *files: dict[str, Any], items: pa.Array, **settings: Any) -> Prepared:
    """Prepares a log of several files, one click each second."""
    (folder / "clicks").mkdir(parents=True)
    for number, columns in enumerate(files):
        size = len(columns["item_id"])
        times = pa.array(range(10 * number, 10 * number + size))
        table = pa.table({"user_id": pa.array([7] * size), "timestamp": times} | columns)
        pq.write_table(table, folder / "clicks" / f"{number}.parquet")
    catalog = write_items(folder / "items.parquet", items, title=[f"title {n}" for n in range(len(items))])
    return prepare(folder, interactions=str(folder / "clicks"), items=str(catalog), **settings)


@pytest.mark.parametrize(
    ("log", "items", "ids"),
    [
        (pa.array([1, 2, 3, 4], FLOAT), pa.array([1, 2, 3, 4], INT), [1, 2, 3, 4]),
        (pa.array([1, 2, 3, 4], INT), pa.array([1, 2, 3, 4], FLOAT), [1, 2, 3, 4]),
        (pa.array([1, 2, 3, 4], FLOAT), pa.array([1, 2, 3, 4], pa.float32()), [1, 2, 3, 4]),
        (pa.array([1, 2, 3, 4], FLOAT), pa.array(["1", "2", "3", "4"]), ["1", "2", "3", "4"]),
        (pa.array([1, 2, 3, 4], INT), pa.array(["1.0", "2", "3.0", "4"]), ["1", "2", "3", "4"]),
        (pa.array(["1.0", "2", "3.0", "4"]), pa.array([1, 2, 3, 4], INT), ["1", "2", "3", "4"]),
        (pa.array(["1.0", "2", "3.0", "4"]), pa.array(["1", "2", "3", "4"]), ["1", "2", "3", "4"]),
        (pa.array(["1.0", "2", "3.0", "4"]).dictionary_encode(), pa.array([1, 2, 3, 4], FLOAT), ["1", "2", "3", "4"]),
    ],
)
def test_the_same_ids_in_other_types_match(tmp_path: Path, log: pa.Array, items: pa.Array, ids: list[Any]) -> None:
    result = _prepared(tmp_path / "log", {"item_id": log}, items=items)
    assert result.ids == ids
    assert [item["title"] for item in result.items] == [f"title {n}" for n in range(4)]
    assert result.rows["test"] == [("7", tuple(ids[:3]), ids[3])]
    lists = pa.ListArray.from_arrays(pa.array([0, 4], pa.int32()), log)
    pq.write_table(pa.table({"session_id": [7.0], "items": lists}), tmp_path / "sessions.parquet")
    settings = {"sessions": str(tmp_path / "sessions.parquet"), "items": str(tmp_path / "log" / "items.parquet")}
    assert prepare(tmp_path, **settings).rows["test"] == result.rows["test"]


def test_files_of_a_log_may_hold_ids_in_other_types(tmp_path: Path) -> None:
    large = 2**53 + 1
    files = [
        {"item_id": pa.array([large, 1], INT)},
        {"item_id": pa.array([2.0, 4.0], FLOAT), "user_id": pa.array([7.0, 7.0])},
        {"item_id": pa.array(["3.0"]), "user_id": pa.array(["7"])},
    ]
    result = _prepared(tmp_path, *files, items=pa.array([large, 1, 2, 3, 4]))
    assert result.rows["test"] == [("7", (str(large), "1", "2", "4"), "3")]
    result = _prepared(tmp_path / "numbers", *files[:2], items=pa.array([large, 1, 2, 4]))
    assert result.rows["test"] == [("7", (large, 1, 2), 4)]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (pa.array([1.0, 2.5, 3.0]), "row 1: column item_id is a float, but no exact integer \\(1 rows"),
        (pa.array([1.0, 2.0**53, 2.0**63]), "row 1: column item_id is a float, but no exact integer \\(2 rows"),
        (pa.array([1.0, 2.0, 2.0**24], pa.float32()), "row 2: column item_id is a float, but no exact integer"),
        (pa.array([1.0, np.nan, 2.5], FLOAT), "row 2: column item_id is a float"),
        (pa.array([1.0, np.nan, 2.0], FLOAT), "row 1: column item_id is null"),
        (pa.array([1.0, np.inf, 2.0], FLOAT), "row 1: column item_id is null or NaN"),
        (pa.array([1.0, -2.0, 3.0], FLOAT), "row 1: column item_id is negative"),
    ],
)
def test_floats_that_are_no_ids_are_refused(tmp_path: Path, values: pa.Array, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        _prepared(tmp_path, {"item_id": values}, items=pa.array([1, 2, 3, 4]))
    assert "\n" not in str(caught.value)


def test_times_as_numbers(tmp_path: Path) -> None:
    second = 1706702400.0
    orders = {
        "before 1970": pa.array([5, -2, -3, -5 * 10**9]),
        "microseconds": pa.array([second + 3e-6, second + 2e-6, second + 1e-6, second]),
        "whole": pa.array([second + 3, second + 2, second + 1, second]),
        "milliseconds": pa.array([second * 1000 + 1, second * 1000 + 0.5, second * 1000 + 0.25, second * 1000]),
        "nanoseconds": pa.array([4, 3, 2, 1], pa.timestamp("ns")),
        "float32": pa.array([4, 3, 2, 1], pa.float32()),
    }
    for name, times in orders.items():
        table = {"item_id": list("abcd"), "timestamp": times}
        result = _prepared(tmp_path / name, table, items=pa.array(list("abcd")))
        assert result.rows["test"] == [("7", ("d", "c", "b"), "a")], name
    bad = {
        "column timestamp is null": pa.array([1.0, np.nan, 3.0, 4.0]),
        "column timestamp is not a time": pa.array([1, -(2**63), 3, 4]),
        "1 in seconds and 2 in milliseconds since 1970; .* --time_unit": pa.array(
            [int(second), int(second) * 1000, int(second) * 1000 + 1, 5]
        ),
    }
    for number, (message, times) in enumerate(bad.items()):
        with pytest.raises(UserError, match=message):
            _prepared(
                tmp_path / f"bad{number}", {"item_id": list("abcd"), "timestamp": times}, items=pa.array(list("abcd"))
            )
    mixed = {"item_id": list("abcd"), "timestamp": list(bad.values())[-1]}
    assert _prepared(tmp_path / "forced", mixed, items=pa.array(list("abcd")), time_unit="milliseconds").rows[
        "test"
    ] == [("7", ("d", "a", "b"), "c")]


def test_few_matching_ids_and_words_for_missing_values_are_warnings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("llmgr_rec"), "propagate", True)
    table = {"item_id": pa.array(["a", "b", "c", "A1", "A2", "A3", "A4", "nan"])}
    items = pa.array(["a", "b", "c", "a1"])
    (tmp_path / "clicks").mkdir()
    times = {"user_id": ["7"] * 7 + ["Undefined"], "timestamp": range(8)}
    pq.write_table(pa.table(times | table), tmp_path / "clicks" / "0.parquet")
    titles = ["Tea", "None", None, "nan"]
    catalog = write_items(tmp_path / "items.parquet", items, title=titles)
    paths = {"interactions": str(tmp_path / "clicks"), "items": str(catalog)}
    result = prepare(tmp_path, **paths, missing_items="keep")
    assert [item["title"] for item in result.items] == ["Tea", "None", None] + [None] * 5
    assert "row 1: column title is a word for a missing value in 2 rows" in caplog.text
    assert "only 3 of 8 item ids" in caplog.text
    assert "the clicks have 'A1', 'A2', 'A3', the item file has 'a1'" in caplog.text
    assert "row 7: column user_id is a word for a missing value in 1 rows (one of 'nan'" in caplog.text
    assert "row 7: column item_id is a word for a missing value in 1 rows (one of 'nan'" in caplog.text


def test_columns_with_the_names_of_duckdb(tmp_path: Path) -> None:
    extra = {"filename": [1, 2, 3, 4], "source_row": [9] * 4, 'it"s': [1, 2, 3, 4], "A": [1] * 4, "a": [2] * 4}
    result = _prepared(tmp_path, {"item_id": list("abcd")} | extra, items=pa.array(list("abcd")))
    assert result.rows["test"] == [("7", ("a", "b", "c"), "d")]
    for number, name in enumerate(("FILE_ROW_NUMBER", "file_index")):
        with pytest.raises(UserError, match=f"name of column {name} is reserved; rename"):
            _prepared(
                tmp_path / str(number), {"item_id": list("abcd"), name: [1, 2, 3, 4]}, items=pa.array(list("abcd"))
            )
