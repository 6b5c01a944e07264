from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.work_folder import open_work, timed
from llmgr_rec.errors import UserError


def test_a_folder_of_other_options_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "work"
    for _ in range(2):
        assert open_work(folder, {"days": 4, "items": "a.parquet"}) == folder
    with pytest.raises(UserError, match="work was made with --days 4, not 3; give the same, or another --work"):
        open_work(folder, {"days": 3, "items": "a.parquet"})


def test_a_command_that_was_stopped_is_run_again_and_a_complete_one_is_not(tmp_path: Path) -> None:
    output, calls = tmp_path / "run", []

    def command(words: Sequence[str]) -> None:
        calls.append(list(words))
        output.mkdir()
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timed(output, command, ["a"])
    seconds = timed(output, command, ["b"])
    assert timed(output, command, ["c"]) == seconds
    assert calls == [["a"], ["b"]]
