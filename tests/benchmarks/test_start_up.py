import sys

import pytest

from benchmarks import start_up
from benchmarks.start_up import COMMANDS, first_step_seconds, help_seconds, table
from llmgr_rec.cli import run_cli
from llmgr_rec.errors import UserError


def test_help_of_a_command_takes_a_moment():
    assert 0 < help_seconds("score") < 30


def test_table_has_a_row_for_each_command():
    spread = {"median": 0.25, "low": 0.2, "high": 0.3}
    text = table({"help_s": dict.fromkeys(COMMANDS, spread), "first_step_s": spread, "language_model": "smollm2"})
    assert all(f"llmgr_rec.{command} --help" in text for command in COMMANDS)
    assert "first step" in text
    assert "smollm2" in text


@pytest.mark.slow
def test_a_training_that_ends_without_a_step_says_why(tmp_path):
    with pytest.raises(UserError, match=r"ended before its first step: .*is not a prepared data set"):
        first_step_seconds(tmp_path / "absent", tmp_path / "run")


def test_a_bad_argument_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["start_up", "--rounds", "0"])
    with pytest.raises(SystemExit) as ended:
        run_cli(start_up.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --rounds is 0; set it to 1 or more\n"
