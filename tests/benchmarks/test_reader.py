import json
import sys

import pytest
import torch

from benchmarks import plain_graphs, reader
from benchmarks.planted_split import write_split
from benchmarks.reader import Settings, check_graphs, compare, table
from llmgr_rec.cli import run_cli
from llmgr_rec.data.graph import build_graphs
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.row_groups import RowGroups

SESSIONS = [[3, 5, 3, 5, 7], [2], [9, 9, 1], [4, 6, 4]]


def fast(sessions):
    items = torch.tensor([item for session in sessions for item in session])
    rows = Jagged.from_lengths(items, torch.tensor([len(session) for session in sessions]))
    return build_graphs(rows.values, rows.offsets, 10)


def test_the_plain_loop_and_the_product_build_the_same_graphs():
    ours = list(plain_graphs.fast_contents(fast(SESSIONS)))
    assert ours == list(plain_graphs.plain_contents(plain_graphs.build(SESSIONS)))
    assert ours[0] == ([3, 5, 7], SESSIONS[0], {(3, 5): 2, (5, 3): 1, (5, 7): 1})


@pytest.mark.parametrize("other", [[3, 5, 5, 3, 7], [3, 5, 3, 5, 8], [3, 5, 3, 5]])
def test_another_session_gives_another_graph(other):
    ours = list(plain_graphs.fast_contents(fast([other, *SESSIONS[1:]])))
    theirs = list(plain_graphs.plain_contents(plain_graphs.build(SESSIONS)))
    assert ours[0] != theirs[0]
    assert ours[1:] == theirs[1:]


def test_a_written_split_is_what_the_plain_reader_reads(tmp_path):
    parts, catalog = write_split(tmp_path / "d" / "train", sessions=300, items=64, mean_length=9, seed=0)
    sessions, targets = plain_graphs.read_rows(parts, first_groups=1)
    groups = RowGroups(parts, num_items=64, by_click=False)
    assert groups[0].items.values.tolist() == [item for session in sessions for item in session]
    assert groups[0].targets_R.tolist() == targets
    assert catalog.train_count_V.sum() == sum(map(len, sessions)) + len(targets)
    assert sum(map(len, sessions)) / len(sessions) == pytest.approx(9, abs=0.5)


def test_table_has_a_row_for_each_side(tmp_path):
    results = compare(tmp_path, Settings(sessions=600, items=64, mean_length=9, batch_size=64), rounds=1)
    results["waiting"] = {
        "language_model": "random-tiny",
        "stages": {"sbr": {"median": 0.01, "low": 0.005, "high": 0.015}},
    }
    text = table(results)
    assert all(name in text for name in results["sessions_per_s"])
    assert "700,000" in text
    assert "0.01 [0.005 .. 0.015]" in text
    json.dumps(results)


def test_unlike_graphs_are_refused(tmp_path, monkeypatch):
    parts, catalog = write_split(tmp_path / "d" / "train", sessions=100, items=64, mean_length=9, seed=0)
    decoded = reader._decoded_reader(parts, catalog, 50, ())
    check_graphs(decoded, batches=2)
    build = plain_graphs.build
    monkeypatch.setattr(plain_graphs, "build", lambda sessions: build([[1]] * 50))
    with pytest.raises(RuntimeError, match="session 0: the graphs differ"):
        check_graphs(decoded, batches=1)


def test_a_bad_argument_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reader", "--batch_size", "0"])
    with pytest.raises(SystemExit) as ended:
        run_cli(reader.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --batch_size is 0; it must lie between 1 and --sessions\n"
