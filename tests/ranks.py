"""Runs a function on several gloo ranks, for tests of what happens between ranks."""

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmgr_rec.parent_process import end_with_parent


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """Runs `function(world, *args)` in one process a rank, each with one thread, and returns what each returned.

    The processes come from a server that has imported torch and torchrec once, so only the first call pays for that.
    None is left behind: not after a failure, not after the time limit, not when the test run itself is killed.

    Args:
        function: A function of a test module (found again by name); its first argument is the rank's `World`.
        world_size: Ranks.
        args: Further arguments, pickled.
        timeout_s: Seconds after which all ranks are killed and the test fails.

    Returns:
        Results in rank order.

    Raises:
        RuntimeError: A rank failed (with its traceback) or the time limit passed.
    """
    import torch.distributed as dist

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks_preload"])
    # The store listens on a port of the system's choice and the ranks only connect to it: no port is guessed.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_run_rank, args=(function, args, rank, world_size, store.port, folder, timeout_s), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return _results(processes, Path(folder), timeout_s)


def _wait(processes: Sequence[Any], deadline: float) -> None:
    """Waits for all, but no longer than shortly after the first failure: the others then wait for the dead one."""
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + 2)
        time.sleep(0.01)


def _results(processes: Sequence[Any], folder: Path, timeout_s: float) -> list[Any]:
    results, failures = [], []
    for rank, process in enumerate(processes):
        answer = folder / f"{rank}.pickle"
        if not answer.exists():
            failures.append((2, f"rank {rank} gave no answer (exit code {process.exitcode}, limit {timeout_s} s)"))
            continue
        succeeded, value = pickle.loads(answer.read_bytes())  # noqa: S301 (this very test wrote it)
        if succeeded:
            results.append(value)
        else:
            failures.append((1, f"rank {rank} failed:\n{value}"))
    if failures:
        raise RuntimeError("\n".join(text for _, text in sorted(failures)))
    return results


def _run_rank(
    function: Callable[..., Any], args: Sequence[Any], rank: int, size: int, port: int, folder: str, timeout_s: float
) -> None:
    end_with_parent()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    from llmgr_rec.distributed.process_group import init_distributed, shutdown

    try:
        world = init_distributed("cpu", int(timeout_s), threads=1)
        answer = (True, function(world, *args))
        shutdown()
    except BaseException:
        answer = (False, traceback.format_exc())
    partial = Path(folder) / f"{rank}.partial"
    partial.write_bytes(pickle.dumps(answer))
    partial.rename(Path(folder) / f"{rank}.pickle")
    sys.stdout.flush()
    # Interpreter shutdown after a failed collective can hang in gloo's threads; the answer is on disk already.
    os._exit(0 if answer[0] else 1)
