"""How prepare reads files: folders of them, their names, and columns in other types."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.prepare_inputs import prepare, write_interactions, write_items


def test_integer_ids_and_arrow_timestamps_in_a_folder_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "clicks[1]"
    folder.mkdir()
    (folder / "_SUCCESS.parquet").write_bytes(b"")
    for name, first in (("b", 4), ("a", 0)):
        table = {
            "timestamp": pa.array(range(first, first + 4), pa.timestamp("ns", "UTC")),
            "item_id": pa.array(range(first, first + 4), pa.int32()),
            "user_id": pa.array([7] * 4, pa.int64()),
            # Names that the queries use themselves.
            "row": pa.array([3, 2, 1, 0]),
            "place": pa.array([0] * 4),
        }
        pq.write_table(pa.table(table), folder / f"{name}.parquet")
    items = write_items(tmp_path / "items.parquet", list(range(8)))
    result = prepare(tmp_path, interactions=str(folder), items=str(items))
    assert result.rows["test"] == [("7", (0, 1, 2, 3, 4, 5, 6), 7)]
    assert result.ids == list(range(8))


def test_a_column_is_read_from_the_file_and_not_from_the_name_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "user_id=7" / "category=Tea"
    folder.mkdir(parents=True)
    items = write_items(folder / "items.parquet", list("abcd"), category=list("ABCD"))
    clicks = write_interactions(folder / "clicks.parquet", [(user, item, 0) for user in "uv" for item in "abcd"])
    result = prepare(tmp_path, interactions=str(clicks), items=str(items))
    assert result.rows["test"] == [("u", ("a", "b", "c"), "d"), ("v", ("a", "b", "c"), "d")]
    assert [item["category"] for item in result.items] == list("ABCD")


def test_files_may_hold_a_column_in_other_units_and_widths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    (tmp_path / "clicks").mkdir()
    files = {
        "a": (pa.timestamp("us"), pa.int32(), [0, 2000]),
        "b": (pa.timestamp("ns", "UTC"), pa.int64(), [1_000_001, 1_000_999]),
    }
    for name, (unit, width, times) in files.items():
        ids = pa.array([0, 3] if name == "a" else [1, 2])
        columns = {"user_id": pa.array([7, 7], width), "item_id": ids, "timestamp": pa.array(times, unit)}
        pq.write_table(pa.table(columns), tmp_path / "clicks" / f"{name}.parquet")
    items = write_items(tmp_path / "items.parquet", list(range(4)))
    result = prepare(tmp_path, interactions=str(tmp_path / "clicks"), items=str(items))
    assert result.rows["test"] == [("7", (0, 1, 2), 3)]
