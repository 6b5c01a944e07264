"""A run that its launcher restarts goes on by itself; nobody else's run does."""

from pathlib import Path

import pytest

from llmgr_rec.train import _is_restarted, _launch
from llmgr_rec.training.train_run import LAUNCH


@pytest.mark.parametrize(
    ("launch", "noted", "restarted"),
    [("job-1", "job-1", True), ("job-2", "job-1", False), ("none", "", False), ("job-1", None, False)],
)
def test_only_the_launch_that_made_a_run_continues_it_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: str, noted: str | None, restarted: bool
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
    # A user's mistake is retried by the launcher, too: the count of restarts proves nothing about the folder.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    if noted is not None:
        (tmp_path / LAUNCH).write_text(noted)
    assert _is_restarted(tmp_path) is restarted


def test_without_a_launcher_there_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert _launch() == ""
