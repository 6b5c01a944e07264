import sys

import pytest

from benchmarks import start_up
from benchmarks.start_up import COMMANDS, READERS, first_batch_seconds, first_step_seconds, help_seconds, table
from llmgr_rec.cli import run_cli
from llmgr_rec.errors import UserError
from tests.small_run import run_with, small_run


def test_help_of_a_command_takes_a_moment():
    assert 0 < help_seconds("score") < 30


def test_table_has_a_row_for_each_command():
    spread = {"median": 0.25, "low": 0.2, "high": 0.3}
    results = {"help_s": dict.fromkeys(COMMANDS, spread), "first_step_s": spread, "language_model": "smollm2"}
    batches = {"first_batch_s": dict.fromkeys(READERS, spread), "first_batch_cpu_s": dict.fromkeys(READERS, 2.5)}
    text = table(results | batches)
    assert all(f"start of {name} to first batch (2.50 s of CPU)" in text for name in READERS)
    assert all(f"llmgr_rec.{command} --help" in text for command in COMMANDS)
    assert "first step" in text
    assert "smollm2" in text


@pytest.mark.slow
def test_every_reader_gets_to_its_first_batch(tmp_path):
    run = run_with(tmp_path / "run", "sbr")
    for name in READERS:
        wall, cpu = first_batch_seconds(name, run, small_run().dataset.path, tmp_path / name)
        assert 0 < cpu < 60, name
        assert wall > 0


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
