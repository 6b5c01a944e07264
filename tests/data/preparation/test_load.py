"""How prepare reads files: folders of them, their names, and columns in other types."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmgr_rec.errors import UserError
from llmgr_rec.prepare import main
from tests.data.prepare_inputs import prepare, read, write_interactions, write_items


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


def test_partitioned_folders_are_read_with_their_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, elsewhere = tmp_path / "clicks", tmp_path / "elsewhere"
    # In alphabetical order of the folders, which is the order of ties in time.
    for path, items in (
        (elsewhere / "split=train/x.PARQUET", "ab"),
        (folder / "dt=2026-11-03/split=test/x.parq", "d"),
        (folder / "dt=2026-11-02/split=valid/x.parquet", "c"),
    ):
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"user_id": ["u"] * len(items), "item_id": list(items)}), path)
    (folder / "dt=2026-11-01").symlink_to(elsewhere)
    (folder / "notes.txt").touch()
    pq.write_table(pa.table({"user_id": pa.nulls(0)}), folder / "empty.parquet")
    catalog = tmp_path / "items" / "category=Te%20a"
    catalog.mkdir(parents=True)
    write_items(catalog / "items.parquet", list("abcd"))
    options = ["--interactions", str(folder), "--items", str(tmp_path / "items"), "--output", str(tmp_path / "dataset")]
    with pytest.raises(UserError, match=r"x.PARQUET: column timestamp is missing"):
        main(options)
    for day in list(folder.iterdir()):
        if day.name.startswith("dt="):
            day.rename(folder / day.name.replace("dt=", "timestamp="))
    main([*options, "--split", "predefined", "--min_interactions", "0"])
    result = read(tmp_path / "dataset")
    assert result.rows == {
        "train": [("u", ("a",), "b")],
        "valid": [("u", ("a", "b"), "c")],
        "test": [("u", ("a", "b", "c"), "d")],
    }
    assert [item["category"] for item in result.items] == ["Te a"] * 4
    printed = capsys.readouterr().out
    assert "interactions: 4 files read (empty.parquet, timestamp=2026-11-01/split=train/x.PARQUET, " in printed
    assert ", 1 skipped (notes.txt: not named *.parquet)\n" in printed
    assert "items: 1 file read (category=Te%20a/items.parquet)\n" in printed
    for before, name in (("timestamp=2026-11-02", "timestamp=Monday"), ("timestamp=Monday", "timestamp=2026-02-29")):
        (folder / before).rename(folder / name)
        with pytest.raises(UserError, match=f"column timestamp is in the folder name {name}, but must be int64"):
            main([*options[:-1], str(tmp_path / "other")])


def test_partition_values_have_the_type_of_their_column(tmp_path: Path) -> None:
    folder = tmp_path / "clicks"
    for user in ("7", "12"):
        (folder / f"user_id={user}").mkdir(parents=True)
        table = pa.table({"item_id": list("abcd"), "timestamp": [0, 1, 2, 3]})
        pq.write_table(table, folder / f"user_id={user}" / "x.parquet")
    items = str(write_items(tmp_path / "items.parquet", list("abcd")))
    result = prepare(tmp_path, interactions=str(folder), items=items)
    assert [row[0] for row in result.rows["test"]] == ["12", "7"]
    # A null is an error like a null in a file, and a column that only some files have is named.
    (folder / "user_id=7").rename(folder / "user_id=__HIVE_DEFAULT_PARTITION__")
    with pytest.raises(UserError, match=r"PARTITION__/x.parquet, row group 0, row 0: column user_id is null"):
        prepare(tmp_path, interactions=str(folder), items=items, output=str(tmp_path / "o"))
    write_interactions(folder / "z.parquet", [("u", "a", 0)])
    with pytest.raises(UserError, match=r"z.parquet: column user_id is string, but from the folder name in"):
        prepare(tmp_path, interactions=str(folder), items=items, output=str(tmp_path / "o"))
