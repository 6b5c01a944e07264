"""Lists of the output, also where their offsets do not fit into 32 bits."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmgr_rec.scoring import ranked_lists
from llmgr_rec.scoring.ranked_lists import RankedLists

IDS_RK = np.array([[2, 0, 1], [1, -1, -1], [-1, -1, -1]])
SCORES_RK = np.array([[3.0, 2.0, 1.0], [0.5, 0, 0], [0, 0, 0]], np.float32)


@pytest.mark.parametrize("item_ids", [pa.array(["a", "bb", "cc"]), pa.array([7, 8, 9])])
def test_lists_are_large_where_they_may_be_long(
    tmp_path: Path, item_ids: pa.Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 2 if pa.types.is_string(item_ids.type) else 1
    small = RankedLists({"item_ids": item_ids}, rows=3, k=3).columns(IDS_RK, SCORES_RK)
    assert small["item_ids"].type == pa.list_(item_ids.type)
    monkeypatch.setattr(ranked_lists, "_MAX_OFFSET", 3 * 3 * longest - 1)
    large = RankedLists({"item_ids": item_ids}, rows=3, k=3).columns(IDS_RK, SCORES_RK)
    id_type = pa.large_string() if longest == 2 else pa.int64()
    assert [column.type for column in large.values()] == [pa.large_list(id_type), pa.large_list(pa.float32())]
    assert pa.table(small).to_pylist() == pa.table(large).to_pylist()
    pq.write_table(pa.table(large), tmp_path / "large.parquet")
    assert pq.read_table(tmp_path / "large.parquet").to_pylist() == pa.table(small).to_pylist()
    ids = item_ids.to_pylist()
    assert large["item_ids"].to_pylist() == [[ids[2], ids[0], ids[1]], [ids[1]], []]
    # The types are those of the longest part, also where this one is short.
    monkeypatch.setattr(ranked_lists, "_MAX_OFFSET", 3 * 3 * longest)
    assert RankedLists({"item_ids": item_ids}, rows=3, k=3).columns(IDS_RK, SCORES_RK)["scores"].type == pa.list_(
        pa.float32()
    )


def test_titles_count_for_the_length_of_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"item_ids": pa.array([7, 8, 9]), "titles": pa.array(["title", None, ""])}
    monkeypatch.setattr(ranked_lists, "_MAX_OFFSET", 3 * 3 * len("title"))
    small = RankedLists(values, rows=3, k=3).columns(IDS_RK, SCORES_RK)
    monkeypatch.setattr(ranked_lists, "_MAX_OFFSET", 3 * 3 * len("title") - 1)
    large = RankedLists(values, rows=3, k=3).columns(IDS_RK, SCORES_RK)
    assert [small["titles"].type, large["titles"].type] == [pa.list_(pa.string()), pa.large_list(pa.large_string())]
    assert small["titles"].to_pylist() == large["titles"].to_pylist() == [["", "title", None], [None], []]
    without = {"item_ids": pa.array([7]), "titles": pa.array([None], pa.string())}
    assert RankedLists(without, 1, 1).columns(np.array([[0]]), SCORES_RK[:1, :1])["titles"].to_pylist() == [[None]]
