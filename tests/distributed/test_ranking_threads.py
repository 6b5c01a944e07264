"""Threads that rank sessions: those asked for, otherwise as many as the work is worth."""

import pytest

from llmgr_rec.config import Config
from llmgr_rec.distributed import ranking_threads
from llmgr_rec.distributed.ranking_threads import ranking_runtime


@pytest.mark.parametrize(
    ("threads", "num_items", "has_language_model", "expected"),
    [
        (None, 1349, False, 1),
        (None, 12_101, False, 1),
        (None, 40_000, False, 4),
        (None, 10**6, False, 8),
        (None, 1349, True, 0),
        (3, 1349, False, 3),
        (3, 1349, True, 3),
    ],
)
def test_small_work_gets_one_thread(
    threads: int | None,
    num_items: int,
    has_language_model: bool,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ranking_threads, "usable_cores", lambda: 8)
    assert ranking_runtime(Config(), threads, num_items, has_language_model).threads_per_rank == expected


def test_what_is_given_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert ranking_runtime(config, None, 1349, has_language_model=False) is config.runtime
    monkeypatch.delenv("OMP_NUM_THREADS")
    config.runtime.threads_per_rank = 5
    assert ranking_runtime(config, None, 1349, has_language_model=False) is config.runtime
