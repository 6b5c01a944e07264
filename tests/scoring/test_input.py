"""Bad input to scoring: one line that names the place, before anything is written."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.errors import UserError
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
        (pa.array([[1, 2], [3]]), {}, r"column items has int64 ids, but the catalog's item ids are string; cast"),
        (pa.array(["i1", "i2"]), {}, r"column items is string, not a list"),
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
    with pytest.raises(UserError, match=r"--input .*absent does not exist"):
        score(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no \.parquet files"):
        score(tmp_path / "empty", tmp_path / "out")
    source = write_sessions(tmp_path / "in" / "a.parquet", GOOD)
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.parquet is truncated or not a Parquet file"):
        score(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_null_session_ids_and_columns_of_two_types(tmp_path):
    ids = pa.array(["a", None, "c"])
    source = write_sessions(tmp_path / "nulls.parquet", GOOD[:3], session_id=ids)
    with pytest.raises(UserError, match="column session_id has 1 nulls"):
        score(source, tmp_path / "out")
    table = pq.read_table(write_sessions(tmp_path / "twice.parquet", GOOD[:3]))
    pq.write_table(table.append_column("session_id", table["session_id"]), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="has more than one column session_id; keep one of them"):
        score(tmp_path / "twice.parquet", tmp_path / "out")
    write_sessions(tmp_path / "in" / "a.parquet", GOOD[:3])
    write_sessions(tmp_path / "in" / "b.parquet", GOOD[:3], session_id=[1, 2, 3])
    with pytest.raises(UserError, match=r"b\.parquet: column session_id is int64, but string in the files before"):
        score(tmp_path / "in", tmp_path / "out")


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


@given(
    st.lists(st.lists(st.integers(0, 6), max_size=5), min_size=1, max_size=30),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_parts_hold_every_row_once_in_order(tmp_path_factory, sessions, group_rows, part_rows, large):
    folder = tmp_path_factory.mktemp("parts")
    catalog = Catalog.load(write_items(folder / "items", 5))
    lists = pa.array([[f"id{item}" for item in session] for session in sessions], pa.list_(pa.string()))
    if large:
        lists = lists.cast(pa.large_list(pa.large_string()))
    source = write_sessions(folder / "in.parquet", lists, row_group_size=group_rows)
    files = SessionFiles(source, ["session_id"], catalog, "skip")
    rows, read, unknown = [], [], 0
    for part in files.parts(part_rows):
        found = files.read(part)
        assert found.table.num_rows == part.rows == len(found.offsets) - 1
        rows += found.table["session_id"].to_pylist()
        unknown += found.unknown_items
        for start, end in zip(found.offsets[:-1], found.offsets[1:], strict=True):
            read.append(found.items_L[start:end].tolist())
    assert rows == [f"in-{row}" for row in range(len(sessions))]
    assert read == [[item for item in session if item < 5] for session in sessions]
    assert unknown == sum(item >= 5 for session in sessions for item in session)
