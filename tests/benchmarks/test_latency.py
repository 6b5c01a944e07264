import sys

import pytest

from benchmarks import latency
from llmgr_rec.cli import run_cli


def test_every_size_has_a_row():
    found = latency.measure(num_items=300, sessions=3, k=5, rounds=1)
    assert 0 < found["wall"]["p50"] <= found["wall"]["p99"]
    assert found["cpu"]["p99"] > 0
    assert "12,101" in latency.table({"12101": found}, threads=1)


def test_a_bad_argument_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["latency", "--sessions", "0"])
    with pytest.raises(SystemExit) as ended:
        run_cli(latency.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --sessions is 0; set it to 1 or more\n"
