"""A rank that hangs is named, with its step and collective, and the ranks that wait for it end."""

import os
import re
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llmgr_rec.distributed import process_group, rank_watch
from llmgr_rec.distributed.collectives import sum_over_ranks
from llmgr_rec.distributed.process_group import (
    World,
    init_distributed,
    report_progress,
    set_collective_timeout,
)
from llmgr_rec.errors import RankLostError
from tests.ranks import run_on_ranks


def slow(*values: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def hang(world: World, how: str, output: str) -> None:
    """Rank 1 (rank 0 with `keeper`) does not come to the second sum; what the other says is written to a file."""
    (watch,) = process_group._watches
    rank_watch._INTERVAL_S, process_group._AFTER_WATCH_S = 0.2, 0
    with open(output, "a") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    if how in ("stopped", "keeper"):
        watch._silence_s = 2
    if how == "asleep":
        set_collective_timeout(world, 3)
    report_progress("stage sbr, step 7")
    sum_over_ranks(torch.ones(1), world)
    if world.rank == (0 if how == "keeper" else 1):
        # The threads still wait for the interval that they have started with.
        time.sleep(1.2)
        if how == "asleep":
            time.sleep(100)
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    try:
        sum_over_ranks(torch.ones(1), world)
    except RuntimeError as error:
        sys.stderr.write(f"error: {watch.explain(error)}\n")
        sys.stderr.flush()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("stopped", r"rank 1 \(pid \d+\) gave no sign of life for \d s, last at stage sbr, step 7, outside"),
        ("keeper", r"rank 0 \(pid \d+\) gave no sign of life for \d+ s, last at stage sbr, step 7, outside"),
        slow("asleep", r"rank 1 \(pid \d+\) did not come, last at stage sbr, step 7, outside of collectives"),
        slow("killed", r"rank 1 \(pid \d+\) has ended or hangs, last at stage sbr, step 7, outside of collectives"),
    ],
)
def test_a_rank_that_does_not_come_is_named(tmp_path: Path, how: str, says: str) -> None:
    output = tmp_path / "stderr"
    with pytest.raises(RuntimeError, match="gave no answer"):
        run_on_ranks(hang, 2, how, str(output), timeout_s=60)
    waiting = 1 if how == "keeper" else 0
    lines = [line for line in output.read_text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(says, lines[0]), lines[0]
    assert f"rank {waiting} waited for it at stage sbr, step 7, all_reduce" in lines[0]


def late(world: World) -> str:
    if world.rank == 1:
        time.sleep(1.5)
        return ""
    dist.destroy_process_group()
    try:
        init_distributed("cpu", 1)
    except RankLostError as error:
        return str(error)
    return "started"


@pytest.mark.dist
def test_a_rank_that_does_not_start_is_named() -> None:
    assert run_on_ranks(late, 2)[0].startswith("ranks 1 of 2 have not started within 1 s")


def test_the_collective_is_the_one_that_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Looking:
        def wait(self) -> None:
            seen.append(rank_watch.describe(sys._getframe()))

    seen.append(rank_watch.describe(sys._getframe()))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        monkeypatch.setattr(dist.ProcessGroup, "allreduce", lambda *arguments: Looking())
        sum_over_ranks(torch.ones(1), World(0, 2, 2, torch.device("cpu")))
    finally:
        dist.destroy_process_group()
    assert seen == ["outside of collectives", "all_reduce"]
