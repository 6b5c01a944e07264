"""Bad input to scoring: one line that names the place, before anything is written."""

import logging
import os
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.errors import UserError
from llmgr_rec.scoring import blocks
from llmgr_rec.scoring.input import SessionFiles
from llmgr_rec.scoring.score_run import ScoreRequest, score_run
from tests.data.files import write_items, write_part
from tests.scoring.sessions import write_sessions
from tests.small_run import small_run

GOOD = [["i1", "i2"], [], ["i3"]] * 4


def score(source: Path, output: Path, **options: object) -> None:
    score_run(ScoreRequest(run=small_run().run, stage="sbr", input=source, output=output, **options))


def nulls_in_lists() -> pa.Array:
    return pa.array([*GOOD, ["i1", None]], pa.list_(pa.string()))


def null_lists() -> pa.Array:
    return pa.array([*GOOD, None], pa.list_(pa.string()))


@pytest.mark.parametrize(
    ("sessions", "options", "message"),
    [
        (nulls_in_lists(), {}, r"row group 1: column items has 1 null item ids; remove them"),
        (null_lists(), {}, r"row group 1: column items has 1 nulls; write an empty list"),
        (pa.array(["i1", "i2"]), {}, r"column items is string, not a list"),
        (pa.array([[True], []]), {}, r"column items has bool ids, but ids are text or integers; cast"),
        (GOOD, {"columns": ["weigth"]}, r"no column weigth, did you mean weight"),
        (GOOD, {"columns": ["scores"]}, r"--columns names scores, which is a column of the output"),
        (GOOD, {"k": 0}, r"--k is 0"),
        ([*GOOD, ["i1", "x9", "x8"]], {"unknown_items": "error"}, r"row group 1: .* 2 items .* the first is 'x9'"),
        ([], {}, r"has no sessions"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, sessions, options, message):
    source = write_sessions(tmp_path / "in" / "a.parquet", sessions, weight=np.zeros(len(sessions)))
    with pytest.raises(UserError, match=message) as caught:
        score(source, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_absent_truncated_and_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"absent does not exist; give .* to --input"):
        score(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no \*\.parquet file"):
        score(tmp_path / "empty", tmp_path / "out")
    source = write_sessions(tmp_path / "in" / "a.parquet", GOOD)
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.parquet \(--input\) is not a complete Parquet file"):
        score(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_null_session_ids_and_a_column_twice(tmp_path):
    ids = pa.array(["a", None, "c"])
    source = write_sessions(tmp_path / "nulls.parquet", GOOD[:3], session_id=ids)
    with pytest.raises(UserError, match="column session_id has 1 nulls"):
        score(source, tmp_path / "out")
    table = pq.read_table(write_sessions(tmp_path / "twice.parquet", GOOD[:3]))
    pq.write_table(table.append_column("session_id", table["session_id"]), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="has more than one column session_id; keep one of them"):
        score(tmp_path / "twice.parquet", tmp_path / "out")


def test_indices_of_another_catalog_or_out_of_range(tmp_path):
    part = write_part(tmp_path / "part.parquet", [([1, 2], 3)])
    with pytest.raises(UserError, match="item indices of another catalog"):
        score(part, tmp_path / "out")
    catalog = Catalog.load(write_items(tmp_path / "items", 4))
    object.__setattr__(catalog, "hash", "hash")
    for wrong in (-1, 4):
        part = write_part(tmp_path / "part.parquet", [([1, 2], 3), ([1, wrong], 3)])
        files = SessionFiles(part, ["session_id"], catalog, "skip")
        with pytest.raises(UserError, match=f"item index {wrong}, but the catalog has items 0 to 3"):
            files.check(lambda rows: None)


def test_lists_of_a_fixed_size_are_lists(tmp_path):
    clicks = [["i1", "i2"], ["i3", "i1"]]
    for name, kind in (("list", pa.list_(pa.string())), ("fixed", pa.list_(pa.string(), 2))):
        score(write_sessions(tmp_path / f"{name}.parquet", pa.array(clicks, kind)), tmp_path / name)
    plain, fixed = (pq.read_table(tmp_path / name / "part-00000.parquet") for name in ("list", "fixed"))
    assert fixed["item_ids"].equals(plain["item_ids"])


def test_scores_beside_their_sessions_are_no_input(tmp_path, monkeypatch):
    write_sessions(tmp_path / "in" / "a.parquet", GOOD)
    score(tmp_path / "in", tmp_path / "in" / "scores")
    before = sorted(path.name for path in (tmp_path / "in" / "scores").iterdir())
    score(tmp_path / "in", tmp_path / "in" / "scores")
    assert sorted(path.name for path in (tmp_path / "in" / "scores").iterdir()) == before


def test_foreign_output_folders_are_left_alone(tmp_path):
    source = write_sessions(tmp_path / "in.parquet", GOOD)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not a scoring output"):
        score(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="is a file"):
        score(source, tmp_path / "out" / "notes.txt")


def test_an_untrained_run_is_refused(tmp_path):
    source = write_sessions(tmp_path / "in.parquet", GOOD)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="no complete export of any stage"):
        score_run(ScoreRequest(run=tmp_path / "run", input=source, output=tmp_path / "out"))
    with pytest.raises(UserError, match="no complete export of stage align"):
        score_run(ScoreRequest(run=small_run().run, input=source, output=tmp_path / "out", stage="align"))


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """Items id0 to id4."""
    return Catalog.load(write_items(tmp_path / "items", 5))


def write(file: Path, **columns: pa.Array) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)


def read_all(files: SessionFiles, part_rows: int = 2) -> tuple[pa.Table, list[list[int]]]:
    """The copied columns and the known items of all rows."""
    parts = [files.read(part) for part in files.parts(part_rows)]
    items = [part.items_L[a:b].tolist() for part in parts for a, b in pairwise(part.offsets)]
    return pa.concat_tables([part.table for part in parts]), items


def test_files_of_many_writers_are_read_as_one_table(tmp_path: Path, catalog: Catalog) -> None:
    folder, far, clicks = tmp_path / "in", tmp_path / "far", [["id0", "id1"], ["id4", "id2"]]
    text = pa.list_(pa.string())
    write(folder / "a.parquet", session_id=pa.array(["a0", "a1"]), items=pa.array(clicks, text), n=pa.nulls(2))
    write(
        folder / "b.PARQUET",
        session_id=pa.array(["b0", "b1"], pa.large_string()),
        items=pa.array(clicks, pa.large_list(pa.large_string())),
        n=pa.array([1, 2], pa.int8()),
    )
    write(
        far / "c.parq",
        session_id=pa.array(["c0", "c1"], pa.string_view()),
        items=pa.array(clicks, pa.list_view(pa.string_view())),
        n=pa.array([2**40, None]),
    )
    folder.joinpath("c").symlink_to(far)
    write(
        folder / "d.pq",
        session_id=pa.array(["d0", "d0"]).dictionary_encode(),
        items=pa.array(clicks, pa.list_(pa.dictionary(pa.int32(), pa.string()), 2)),
        n=pa.array([3, 4], pa.uint16()),
    )
    write(folder / "e.parquet", session_id=pa.array(["e0"]), items=pa.array([[]]), n=pa.array([5], pa.int32()))
    write(folder / "f.parquet", session_id=pa.nulls(0), items=pa.nulls(0))
    (folder / "notes.txt").write_text("mine")
    files = SessionFiles(folder, ["session_id", "n"], catalog, "skip")
    table, items = read_all(files)
    assert table.schema.types == [pa.large_string(), pa.int64()]
    assert table["session_id"].to_pylist() == ["a0", "a1", "b0", "b1", "c0", "c1", "d0", "d0", "e0"]
    assert table["n"].to_pylist() == [None, None, 1, 2, 2**40, None, 3, 4, 5]
    assert items == [[0, 1], [4, 2]] * 4 + [[]]
    assert "c/c.parq" in files.description
    assert "notes.txt: not named *.parquet" in files.description


def test_columns_come_from_the_names_of_folders(tmp_path: Path, catalog: Catalog) -> None:
    for name in ("dt=2026-11-01/hour=9", "dt=2026-11-02/hour=10", "dt=__HIVE_DEFAULT_PARTITION__/hour=7"):
        write(tmp_path / "in" / name / "a.parquet", session_id=pa.array(["a"]), items=pa.array([["id1"]]))
    write(
        tmp_path / "in/dt=x/hour=8/a.parquet", session_id=pa.array(["a"]), items=pa.array([["id1"]]), dt=pa.array(["y"])
    )
    table, _ = read_all(SessionFiles(tmp_path / "in", ["session_id", "hour", "dt"], catalog, "skip"))
    assert table.schema.types == [pa.string(), pa.int64(), pa.string()]
    assert table["hour"].to_pylist() == [9, 10, 7, 8]
    assert table["dt"].to_pylist() == ["2026-11-01", "2026-11-02", None, "y"]
    with pytest.raises(UserError, match=r"has no column hours, did you mean hour\?"):
        SessionFiles(tmp_path / "in", ["session_id", "hours"], catalog, "skip")
    table, _ = read_all(SessionFiles(tmp_path / "in" / "dt=2026-11-01", ["session_id"], catalog, "skip"))
    assert table.num_rows == 1
    write(tmp_path / "log.parquet", session_id=pa.array(["a"]), item_id=pa.array(["id1"]))
    with pytest.raises(UserError, match=r"no column items, a list of item ids a session, .*list\(item_id ORDER BY"):
        SessionFiles(tmp_path / "log.parquet", ["session_id"], catalog, "skip")
    write(tmp_path / "days" / "session_id=__HIVE_DEFAULT_PARTITION__" / "a.parquet", items=pa.array([["id1"]]))
    with pytest.raises(UserError, match="column session_id has 1 nulls; give every row an id"):
        SessionFiles(tmp_path / "days", ["session_id"], catalog, "skip").check(lambda rows: None)


NUMBERS = pa.array([1, 2**60])


@pytest.mark.parametrize(
    ("column", "first", "second", "types"),
    [
        ("session_id", pa.array(["a", "b"]), NUMBERS, ("int64", "string")),
        ("session_id", NUMBERS, pa.array([1.0, 2.0]), ("double", "int64")),
        ("session_id", NUMBERS, pa.array([2**64 - 1, 0], pa.uint64()), ("uint64", "int64")),
        ("extra", NUMBERS, pa.array([1.5, 2.5]), ("int64", "double")),
        ("extra", pa.array(["a", "b"]), pa.array([b"a", b"b"]), ("binary", "string")),
        ("extra", pa.array([1.5, 2.5]), pa.array(["1.50", "2.50"]).cast(pa.decimal128(4, 2)), ("decimal128", "double")),
        ("extra", pa.array([True, False]), NUMBERS, ("int64", "bool")),
        ("extra", pa.array([0, 1], pa.timestamp("us")), pa.array([0, 1], pa.timestamp("us", "UTC")), ("tz=UTC", "us")),
        ("extra", pa.array([0, 2**50], pa.timestamp("ms")), pa.array([0, 1], pa.timestamp("ns")), ("ms", "ns")),
        ("extra", pa.array([["a"], []]), pa.array(["a", "b"]), ("string", "list<")),
    ],
)
def test_values_of_two_kinds_in_a_column_are_refused_with_both_files(
    tmp_path: Path, catalog: Catalog, column: str, first: pa.Array, second: pa.Array, types: tuple[str, str]
) -> None:
    items, ids = pa.array([["id1"], []]), pa.array(["a", "b"])
    for name, values in (("a", first), ("b", second)):
        write(tmp_path / "in" / f"{name}.parquet", **{"items": items, "session_id": ids, "extra": ids, column: values})
    with pytest.raises(UserError) as caught:
        SessionFiles(tmp_path / "in", ["session_id", "extra"], catalog, "skip").check(lambda rows: None)
    message = str(caught.value)
    assert "\n" not in message
    assert f"column {column} is " in message
    assert message.endswith("write it as one type in all files")
    for expected in ("a.parquet", "b.parquet", *types):
        assert expected in message


def test_numbers_that_fit_are_read_as_one_type(tmp_path: Path, catalog: Catalog) -> None:
    kinds = {
        "a": pa.array([1, 2], pa.uint64()),
        "b": pa.array([-1, 2], pa.int16()),
        "c": pa.array([0.5, 1], pa.float32()),
    }
    for name, values in kinds.items():
        write(tmp_path / "in" / f"{name}.parquet", session_id=pa.array([1, 2]), items=pa.array([[], []]), n=values)
    table, _ = read_all(SessionFiles(tmp_path / "in", ["session_id", "n"], catalog, "skip"))
    assert table["n"].to_pylist() == [1, 2, -1, 2, 0.5, 1]
    assert table.schema.field("n").type == pa.float64()


def test_a_warning_says_if_most_items_are_unknown(
    tmp_path: Path, catalog: Catalog, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("llmgr_rec"), "propagate", True)
    for name, sessions, warns in (("few", [["1", "2"], ["id0", "3", "4", "5"]], True), ("half", [["id0", "1"]], False)):
        caplog.clear()
        source = write_sessions(tmp_path / f"{name}.parquet", sessions)
        SessionFiles(source, ["session_id"], catalog, "skip").check(lambda rows: None)
        expected = "only 1 of 6 clicks are on items that the model knows: the input has '1', '2', '3', the model 'id0'"
        assert (expected in caplog.text) == bool(caplog.text) == warns


def test_times_of_spark_and_damaged_pages(tmp_path: Path, catalog: Catalog) -> None:
    time = datetime(9999, 12, 31)
    table = pa.table({"session_id": ["a"], "items": [["id0"]], "time": pa.array([time], pa.timestamp("us"))})
    source = tmp_path / "in.parquet"
    options = {"use_deprecated_int96_timestamps": True, "store_schema": False, "write_page_checksum": True}
    pq.write_table(table, source, use_dictionary=False, compression="none", **options)
    read, _ = read_all(SessionFiles(source, ["session_id", "time"], catalog, "skip"))
    assert read["time"].to_pylist() == [time]
    content = source.read_bytes()
    source.write_bytes(content.replace(b"id0", b"id1"))
    with pytest.raises(UserError, match=r"row group 0: unreadable .*CRC checksum"):
        SessionFiles(source, ["session_id"], catalog, "skip").check(lambda rows: None)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path, catalog: Catalog) -> None:
    wrong, right = pa.array([b"id\xff"]).view(pa.string()), pa.array(["a"])
    lists = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), wrong)
    kinds = [
        ("session_id", {"session_id": wrong, "items": pa.array([["id0"]])}),
        ("items", {"session_id": right, "items": lists}),
    ]
    for name, columns in kinds:
        write(tmp_path / "in.parquet", **columns)
        with pytest.raises(UserError, match=rf"row group 0: column {name} is damaged or not UTF-8 \(.*UTF8") as caught:
            SessionFiles(tmp_path / "in.parquet", ["session_id"], catalog, "skip").check(lambda rows: None)
        assert "\n" not in str(caught.value)


def test_a_file_that_changes_while_it_is_scored_is_refused(tmp_path: Path, catalog: Catalog) -> None:
    source = write_sessions(tmp_path / "in.parquet", [["id0"], ["id1"], ["id2"]])
    files = SessionFiles(source, ["session_id"], catalog, "skip")
    first, second = files.parts(2)
    assert files.read(first).items_L.tolist() == [0, 1]
    write_sessions(source, [["id3"], ["id4"], ["id4"]])
    os.utime(source, (0, 0))
    for part in (second, first):
        with pytest.raises(UserError, match=r"in\.parquet has changed since the job began"):
            files.read(part)


def test_damaged_files_give_all_rows_or_an_error(tmp_path: Path, catalog: Catalog) -> None:
    source, options = tmp_path / "in.parquet", {"write_page_checksum": True, "row_group_size": 2}
    table = pa.table({"session_id": ["a", "b", "c"], "items": [["id0", "id1"], [], ["id4"]]})
    pq.write_table(table, source, **options)
    content, random, refused = source.read_bytes(), np.random.default_rng(0), 0
    for _ in range(200):
        damaged = bytearray(content)
        for place in random.integers(len(damaged), size=random.integers(1, 4)):
            damaged[place] = random.integers(256)
        source.write_bytes(damaged)
        try:
            files = SessionFiles(source, ["session_id"], catalog, "skip")
            files.check(lambda rows: None)
        except UserError:
            refused += 1
            continue
        # The footer of Parquet has no checksum, so a column may be another type.
        assert read_all(files)[0].num_rows == 3
    assert 100 < refused < 200


def test_row_groups_that_arrow_cannot_read_at_once_are_read_in_blocks(
    tmp_path: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = [[f"id{row % 5}"] * (row % 4) for row in range(23)]
    source = write_sessions(tmp_path / "in.parquet", sessions, row_group_size=20, about=["text"] * 23)
    files = SessionFiles(source, ["session_id", "about"], catalog, "skip")
    iter_batches, sizes = pq.ParquetFile.iter_batches, []

    def limited(parquet: pq.ParquetFile, size: int, *more: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        sizes.append(size)
        for number, batch in enumerate(iter_batches(parquet, size, *more, **options)):
            # As Arrow does for lists of more than 2 GiB of text.
            if number and size > 4:
                raise pa.ArrowNotImplementedError("Nested data conversions not implemented for chunked array outputs")
            yield batch

    monkeypatch.setattr(blocks, "_BATCH_ROWS", 8)
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 300)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", limited)
    table, items = read_all(files, part_rows=7)
    assert set(sizes) == {8, 4}
    assert table["session_id"].to_pylist() == [f"in-{row}" for row in range(23)]
    assert items == [[row % 5] * (row % 4) for row in range(23)]


@given(
    st.lists(st.lists(st.integers(0, 6), max_size=5), min_size=1, max_size=30),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 200),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_parts_hold_every_row_once_in_order(
    tmp_path_factory, sessions, group_rows, part_rows, batch_rows, block_bytes, large, random
):
    folder = tmp_path_factory.mktemp("parts")
    catalog = Catalog.load(write_items(folder / "items", 5))
    lists = pa.array([[f"id{item}" for item in session] for session in sessions], pa.list_(pa.string()))
    if large:
        lists = lists.cast(pa.large_list(pa.large_string()))
    source = write_sessions(folder / "in.parquet", lists, row_group_size=group_rows)
    files = SessionFiles(source, ["session_id"], catalog, "skip")
    parts = files.parts(part_rows)
    with mock.patch.multiple(blocks, _BATCH_ROWS=batch_rows, _BLOCK_BYTES=block_bytes):
        found = [files.read(part) for part in parts]
        # A job that is continued reads some parts only, and gets the same arrays.
        for number in random.sample(range(len(parts)), len(parts)):
            again = files.read(parts[number])
            assert again.table["session_id"].chunks == found[number].table["session_id"].chunks
            assert again.items_L.tolist() == found[number].items_L.tolist()
    assert [part.table.num_rows for part in found] == [len(part.offsets) - 1 for part in found]
    assert [part.table.num_rows for part in found] == [part.rows for part in parts]
    rows = [row for part in found for row in part.table["session_id"].to_pylist()]
    read = [part.items_L[a:b].tolist() for part in found for a, b in pairwise(part.offsets)]
    assert rows == [f"in-{row}" for row in range(len(sessions))]
    assert read == [[item for item in session if item < 5] for session in sessions]
    assert sum(part.unknown_items for part in found) == sum(item >= 5 for session in sessions for item in session)
