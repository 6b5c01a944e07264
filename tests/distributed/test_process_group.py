"""The process group: one process without a launcher, several ranks, an error on one rank is an error on all."""

import os
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llmgr_rec.distributed import process_group
from llmgr_rec.distributed.process_group import (
    World,
    choose_device,
    init_distributed,
    long_timeout_group,
    run_on_all_ranks,
    run_on_rank0,
    shutdown,
)
from llmgr_rec.errors import UserError
from tests.ranks import run_on_ranks


def fail_on_one(world: World) -> list[str]:
    """Every way in which a rank can fail, and what this rank sees of it."""

    def fail(rank: int, error: Exception) -> int:
        if world.rank == rank:
            raise error
        return world.rank

    seen = []
    for attempt in (
        lambda: run_on_all_ranks(world, lambda: fail(1, UserError("table x is broken"))),
        lambda: run_on_all_ranks(world, lambda: fail(1, ValueError("bug"))),
        lambda: run_on_rank0(world, lambda: fail(0, UserError("no file"))),
    ):
        try:
            attempt()
        except (UserError, RuntimeError, ValueError) as error:
            seen.append(f"{type(error).__name__}: {error}")
    assert run_on_all_ranks(world, lambda: world.rank) == world.rank
    assert run_on_rank0(world, lambda: os.getpid() if world.rank == 0 else None) is not None
    return [*seen, f"{torch.get_num_threads()} thread, {world.rank} of {world.local_size}"]


@pytest.mark.dist
def test_an_error_on_one_rank_is_an_error_on_all() -> None:
    first, second = run_on_ranks(fail_on_one, 2)
    assert first == [
        "UserError: table x is broken",
        "RuntimeError: rank 1 failed: bug",
        "UserError: no file",
        "1 thread, 0 of 2",
    ]
    assert second == [
        "UserError: table x is broken",
        "ValueError: bug",
        "UserError: no file",
        "1 thread, 1 of 2",
    ]


def wait_for_slow_work(world: World, long_timeout: bool) -> int:
    def work() -> int:
        time.sleep(3)
        return 7

    if not long_timeout:
        return run_on_rank0(world, work, dist.new_group(backend="gloo", timeout=timedelta(seconds=1)))
    with long_timeout_group(world) as group:
        return run_on_rank0(world, work, group)


@pytest.mark.dist
def test_a_long_timeout_group_waits_for_slow_work() -> None:
    assert run_on_ranks(wait_for_slow_work, 2, True) == [7, 7]
    with pytest.raises(RuntimeError, match=r"(?i)tim"):
        run_on_ranks(wait_for_slow_work, 2, False)


def alone(world: World) -> tuple[int, int, str]:
    """Joins again as a process that no launcher started."""
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    again = init_distributed("cpu", 60)
    total = torch.ones(1)
    dist.all_reduce(total)
    return again.rank, again.size, f"{total.item()} {torch.get_num_threads()}"


@pytest.mark.dist
def test_a_process_without_launcher_is_a_world_of_its_own() -> None:
    ((rank, size, text),) = run_on_ranks(alone, 1)
    assert (rank, size) == (0, 1)
    assert text == f"1.0 {int(os.environ['OMP_NUM_THREADS'])}"


def hang_or_fail(world: World, how: str) -> None:
    if how == "fail" and world.rank == 1:
        raise ValueError("rank 1 is broken")
    if how == "hang":
        time.sleep(200)
    dist.barrier()


@pytest.mark.dist
def test_ranks_of_tests_are_stopped_and_explained() -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="ValueError: rank 1 is broken"):
        run_on_ranks(hang_or_fail, 2, "fail", timeout_s=200)
    with pytest.raises(RuntimeError, match="gave no answer"):
        run_on_ranks(hang_or_fail, 2, "hang", timeout_s=3)
    # Far below both waits, far above what a busy machine needs to start the ranks.
    assert time.monotonic() - start < 120


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_gpu_that_is_not_there_is_named() -> None:
    assert choose_device("auto").type == "cpu"
    with pytest.raises(UserError, match=r"finds 0 GPUs.*--runtime.device cpu"):
        choose_device("cuda", 1)


def test_no_thread_of_a_group_outlives_it() -> None:
    world = init_distributed("cpu", 60, threads=1)
    # As a sharded model holds it.
    cycle: list[Any] = [dist.group.WORLD]
    cycle.append(cycle)
    del cycle
    dist.barrier()
    assert world.size == 1
    assert threads_of_groups()
    shutdown()
    assert not threads_of_groups()


def threads_of_groups() -> list[str]:
    names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


@pytest.mark.parametrize(
    ("variable", "local_size", "threads"),
    [("3", 1, 3), ("", 1, 8), ("all", 1, 8), ("0", 1, 8), ("", 2, 4), ("3", 16, 3), ("1", 1, 1), ("", 16, 1)],
)
def test_default_threads(monkeypatch: pytest.MonkeyPatch, variable: str, local_size: int, threads: int) -> None:
    monkeypatch.setattr(process_group, "usable_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert process_group._default_threads(local_size) == threads


@pytest.mark.parametrize(("given", "threads"), [({}, 4), ({"OMP_NUM_THREADS": "1"}, 1)])
def test_one_thread_of_torchrun_is_not_the_wish_of_the_user(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], threads: int
) -> None:
    """torchrun gives its ranks OMP_NUM_THREADS=1 where the user gives nothing."""
    monkeypatch.setattr(process_group, "usable_cores", lambda: 8)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    with subprocess.Popen(["sleep", "60"], env={"PATH": os.defpath, **given}) as launcher:
        try:
            monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
            assert process_group._default_threads(2) == threads
        finally:
            launcher.kill()
