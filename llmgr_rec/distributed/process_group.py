"""The process group: rank, device and threads of this process, and functions that fail on all ranks together."""

import gc
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from llmgr_rec.config import Device, RuntimeConfig
from llmgr_rec.distributed.rank_watch import RankWatch
from llmgr_rec.errors import RankLostError, UserError

T = TypeVar("T")

_STORE_PORT_KEY = "llmgr_rec/store_port"
# Seconds: timeout of one connection attempt to rank 0, and pause between attempts.
_CONNECT_TIMEOUT_S, _RETRY_S = 5.0, 0.05
_AFTER_WATCH_S = 5
_LONG_TIMEOUT = timedelta(days=7)
_ARRIVED = "llmgr_rec/arrived/{}"
# The watch of the other ranks in this process, while it is in a process group of several ranks.
_watches: list[RankWatch] = []


@dataclass(frozen=True)
class World:
    """Rank, world size and device of this process.

    Args:
        rank: Rank of this process, from 0.
        size: Number of processes (world size).
        local_size: Number of processes on this machine.
        device: Device of this process.
    """

    rank: int
    size: int
    local_size: int
    device: torch.device

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> "World":
        """A world of one process."""
        return cls(0, 1, 1, torch.device(device))

    @classmethod
    def current(cls, device: torch.device) -> "World":
        """The world of the process group that this process is in; a world of one process without one.

        Args:
            device: Device of this process.
        """
        if not dist.is_initialized():
            return cls.alone(device)
        size = dist.get_world_size()
        return cls(dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)), device)


def init_distributed(device: Device, timeout_s: int, threads: int = 0, silence_s: int = 0) -> World:
    """Joins the process group described by torchrun's environment variables, or creates one with a single process.

    Args:
        device: `auto` uses CUDA if available.
        timeout_s: Timeout of collective operations, in seconds.
        threads: CPU threads of this rank; 0 follows OMP_NUM_THREADS where the user has set it, and otherwise divides
            the cores of the machine among its ranks.
        silence_s: Seconds without a sign of life after which a rank counts as hung; 0 takes `timeout_s`.

    Raises:
        UserError: CUDA was requested but is not available, or there are more local ranks than GPUs.
        RankLostError: A rank does not come.
    """
    world = launched_world(device)
    torch.set_num_threads(threads or _default_threads(world.local_size))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    # Gloo handles CPU tensors next to NCCL: checkpoint plans and gathered objects.
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    store = _join_store(world, timeout) if _is_launched() else dist.HashStore()
    if world.size > 1:
        watch = RankWatch(store, world.rank, world.size, silence_s or timeout_s)
        watch.announce()
        _wait_for_all(store, world, timeout)
        watch.start()
        _watches.append(watch)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    return world


def _wait_for_all(store: dist.Store, world: World, timeout: timedelta) -> None:
    """Waits until all ranks have joined the store.

    Raises:
        RankLostError: Some have not within the timeout; names them.
    """
    store.set(_ARRIVED.format(world.rank), "")
    keys = [_ARRIVED.format(rank) for rank in range(world.size)]
    try:
        store.wait(keys, timeout)
    except dist.DistStoreError:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise RankLostError(
            f"ranks {', '.join(map(str, missing))} of {world.size} have not started within "
            f"{timeout.total_seconds():.0f} s; see their messages, and start all ranks again"
        ) from None


def _join_store(world: World, timeout: timedelta) -> dist.Store:
    """The store through which the ranks of this attempt find each other.

    torchrun's agent keeps one store across restarts. It still has the addresses of dead ranks, to which the new ranks
    would connect (torch 2.13). So rank 0 opens a new store and publishes its port in the old one. A port published
    before a restart refuses connections, because all ranks exit before any rank is restarted.
    """
    shared: dist.Store
    shared, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return shared
    host = os.environ["MASTER_ADDR"]
    if world.rank == 0:
        fresh = dist.TCPStore(host, 0, world.size, is_master=True, timeout=timeout, wait_for_workers=False)
        shared.set(_STORE_PORT_KEY, str(fresh.port))
        return fresh
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        port = int(shared.get(_STORE_PORT_KEY))
        try:
            socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S)
        else:
            return dist.TCPStore(host, port, world.size, is_master=False, timeout=timeout)


def launched_world(device: Device) -> World:
    """The world described by torchrun's environment variables, without joining it; one process if not launched.

    Args:
        device: `auto` uses CUDA if available.

    Raises:
        UserError: CUDA was requested but is not available, or there are more local ranks than GPUs.
    """
    if not _is_launched():
        return World.alone(choose_device(device))
    size, local_rank = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return World(int(os.environ["RANK"]), size, local_size, choose_device(device, local_rank))


def describe_ranks(runtime: RuntimeConfig, device: Device | None = None) -> str:
    """Device, number of ranks and threads of this command, before it joins its process group.

    Args:
        runtime: Threads and device.
        device: Device; None takes that of `runtime`.

    Raises:
        UserError: The device is not available.
    """
    world = launched_world(device or runtime.device)
    threads = runtime.threads_per_rank or _default_threads(world.local_size)
    ranks = f"{world.size} rank{'s' * (world.size != 1)}"
    return f"device {world.device.type}, {ranks}, {threads} thread{'s' * (threads != 1)} per rank"


def choose_device(device: Device, local_rank: int = 0) -> torch.device:
    """The device of a local rank.

    Args:
        device: `auto` uses CUDA if available.
        local_rank: Rank of the process on its machine, which is also the index of its GPU.

    Raises:
        UserError: The machine has no GPU with that index.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not gpus):
        return torch.device("cpu")
    if local_rank >= gpus:
        raise UserError(
            f"runtime.device is {device} and local rank {local_rank} finds {gpus} GPUs; "
            "start one process per GPU, or set --runtime.device cpu"
        )
    return torch.device("cuda", local_rank)


def shutdown() -> None:
    """Destroys the process group, if there is one, and stops its threads."""
    while _watches:
        _watches.pop().stop()
    if dist.is_initialized():
        dist.destroy_process_group()
        # Models in reference cycles keep process groups alive. Their threads would still run at interpreter exit and
        # sometimes abort the process there (torch 2.13).
        gc.collect()


def report_progress(text: str) -> None:
    """Sets what the other ranks say of this one if it hangs.

    Args:
        text: Progress, such as `stage sbr, step 12`.
    """
    for watch in _watches:
        watch.progress(text)


@contextmanager
def process_group(runtime: RuntimeConfig, device: Device | None = None) -> Iterator[World]:
    """Joins the process group of a command, and leaves it at the end of the block.

    Several ranks do not leave it if another rank is lost or a signal asks to stop, because collectives that have begun
    would have to end first; the process then has to end.

    Args:
        runtime: Timeouts, threads and device.
        device: Device; None takes that of `runtime`.

    Raises:
        UserError: The device is not available.
        RankLostError: Another rank hangs or has ended; in one line that names it.
    """
    world = init_distributed(
        device or runtime.device, runtime.startup_timeout_s, runtime.threads_per_rank, silence_s=runtime.timeout_s
    )
    try:
        yield world
    except Exception as error:
        for watch in _watches:
            if lost := watch.explain(error):
                raise lost from error
        shutdown()
        raise
    except BaseException:
        # Of Ctrl-C, too: a notebook goes on and may join a group again.
        if world.size == 1:
            shutdown()
        raise
    shutdown()


def set_collective_timeout(world: World, timeout_s: int) -> None:
    """Sets the timeout of later collectives of the default group, also those that other libraries call.

    Args:
        world: This process and the world size. All ranks should call this at the same place.
        timeout_s: Seconds; the collectives wait a little longer, so that the watch, which knows more, comes first.
    """
    if world.size > 1:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s + _AFTER_WATCH_S))


@contextmanager
def long_timeout_group(world: World) -> Iterator[dist.ProcessGroup | None]:
    """Yields a group of all ranks with a timeout of days, for work of one rank that may take hours.

    All ranks must call this. The failure of a rank is still noticed: its connections break, and the launcher stops the
    other ranks. A single process needs no group and gets None.
    """
    group = dist.new_group(backend="gloo", timeout=_LONG_TIMEOUT) if world.size > 1 else None
    try:
        yield group
    finally:
        if group is not None:
            dist.destroy_process_group(group)


def run_on_all_ranks(world: World, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs work on every rank and raises on all ranks if it fails on any, so that no rank waits for a failed one.

    Args:
        world: This process and the world size. All ranks must call this.
        work: Work without collective operations.
        group: Group to synchronize in; None uses the default group.

    Returns:
        The result of this rank.

    Raises:
        UserError: A rank failed with a user error; with several, the error of the lowest rank.
        RuntimeError: Another rank failed with another exception. A rank that fails with an exception other than
            `UserError` raises its own.
    """
    error: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    if world.size > 1:
        message = None if error is None else (isinstance(error, UserError), f"{error}" or type(error).__name__)
        messages: list[tuple[bool, str] | None] = [None] * world.size
        dist.all_gather_object(messages, message, group=group)
        failed = [(rank, found) for rank, found in enumerate(messages) if found]
        if failed and (error is None or isinstance(error, UserError)):
            rank, (is_user_error, text) = failed[0]
            raise UserError(text) if is_user_error else RuntimeError(f"rank {rank} failed: {text}")
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def run_on_rank0(world: World, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs work on rank 0 and broadcasts its result, or its failure, to all ranks.

    Args:
        world: This process and the world size. All ranks must call this.
        work: Work without collective operations. Its result is pickled to be sent to the other ranks of the run.
        group: Group to synchronize in; None uses the default group.

    Raises:
        UserError: Rank 0 failed with a user error.
        RuntimeError: Rank 0 failed with another exception.
    """
    result = run_on_all_ranks(world, work if world.rank == 0 else lambda: None, group)
    if world.size == 1:
        return result  # type: ignore[return-value]
    box = [result]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]  # type: ignore[return-value]


def barrier(world: World, group: dist.ProcessGroup | None = None) -> None:
    """Waits until all ranks have called this.

    Args:
        world: This process and the world size.
        group: Group to synchronize in; None uses the default group.
    """
    if world.size > 1:
        dist.barrier(group)


def _is_launched() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _default_threads(local_size: int) -> int:
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) and not _is_set_by_torchrun(given, local_size):
        return int(given)
    return max(1, usable_cores() // local_size)


def _is_set_by_torchrun(threads: str, local_size: int) -> bool:
    """Whether OMP_NUM_THREADS is what torchrun sets for several ranks, and not the wish of the user.

    torchrun sets 1 in its own process, whose environment at its start still says what the user gave.
    """
    if threads != "1" or local_size == 1 or not _is_launched():
        return False
    try:
        at_start = Path("/proc", str(os.getppid()), "environ").read_bytes().split(b"\0")
    except OSError:
        return True
    return not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in at_start)


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
