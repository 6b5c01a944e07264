"""The time that a run has left, and lines of progress where there is no terminal."""

import logging
from types import SimpleNamespace

import pytest

from llmgr_rec import progress_bar
from llmgr_rec.cli import progress
from llmgr_rec.config import StageConfig
from llmgr_rec.training.remaining_time import RemainingTime, StageWork, number_of_validations

SBR = StageConfig(epochs=4, batch_size=8)


def test_the_work_of_a_stage_follows_its_settings() -> None:
    assert StageWork.of(SBR, 20, 2, 5) == StageWork(steps=12, validations=2, selection_passes=5)
    assert StageWork.of(SBR, 20, 3, 0).validations == 2
    assert StageWork.of(SBR, 20, 0, 0).passes == 0
    # The fourth step is in the second epoch, after which the stage ends.
    assert StageWork.of(StageConfig(epochs=4, batch_size=8, max_steps=4), 20, 1, 0) == StageWork(4, 2, 0)
    for last in range(7):
        for every in range(1, 4):
            ends = [epoch for epoch in range(1, last + 1) if epoch % every == 0 or epoch == last]
            for first in range(last + 1):
                assert number_of_validations(first, last, every) == sum(end > first for end in ends)


def test_what_is_left_adds_what_is_measured_and_names_the_rest() -> None:
    remaining = RemainingTime({"sbr": StageWork(12, 2, 5), "align": StageWork(30, 0, 0), "behave": StageWork(20, 1, 1)})
    assert remaining.plan() == (
        "sbr 12 steps and 7 validation passes, align 30 steps, behave 20 steps and 2 validation passes"
    )
    assert remaining.seconds("sbr", remaining.left("sbr", 12, 2)) == (0.0, ["sbr", "align", "behave"])
    remaining.measured_step("sbr", 2.0)
    left = remaining.left("sbr", 9, 1)
    assert left == StageWork(9, 1, 5)
    assert remaining.seconds("sbr", left) == (18.0, ["validation of sbr", "align", "behave"])
    assert remaining.text("sbr", left).endswith("run, not counting validation of sbr, align and behave")
    remaining.measured_pass("sbr", 3.0)
    assert remaining.text("sbr", left) == "about 36 s to the end of the run, not counting align and behave"
    remaining.measured_step("behave", 60.0)
    remaining.measured_pass("behave", 300.0)
    assert remaining.text("behave", remaining.left("behave", 20, 1)) == "about 30 min to the end of the run"


def test_progress_without_a_terminal_is_logged_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress_bar, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    caplog.set_level(logging.INFO)
    with progress(100, "evaluate valid", "session", initial=20) as bar:
        for clock[0] in (10.0, 40.0, 41.0, 69.0, 80.0):
            bar.update(10)
    assert caplog.messages == [
        "evaluate valid: 40 of 100 sessions, about 2 min left",
        "evaluate valid: 70 of 100 sessions, about 48 s left",
    ]
    with progress(None, "prepare", log_lines=False) as bar:
        clock[0] = 200.0
        bar.update()
    assert len(caplog.messages) == 2
