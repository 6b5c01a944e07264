"""The process group: rank, device and threads of this process, and functions that fail on all ranks together."""

import gc
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from llmgr_rec.config import Device
from llmgr_rec.errors import UserError

T = TypeVar("T")

_STORE_PORT_KEY = "llmgr_rec/store_port"
# Seconds: timeout of one connection attempt to rank 0, and pause between attempts.
_CONNECT_TIMEOUT_S, _RETRY_S = 5.0, 0.05
_LONG_TIMEOUT = timedelta(days=7)


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


def init_distributed(device: Device, timeout_s: int, threads: int = 0) -> World:
    """Joins the process group described by torchrun's environment variables, or creates one with a single process.

    Args:
        device: `auto` uses CUDA if available.
        timeout_s: Timeout of collective operations, in seconds.
        threads: CPU threads of this rank; 0 divides the cores of the machine among its ranks, and follows
            OMP_NUM_THREADS for a single rank.

    Raises:
        UserError: CUDA was requested but is not available, or there are more local ranks than GPUs.
    """
    world = launched_world(device)
    torch.set_num_threads(threads or _default_threads(world.local_size))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    # Gloo handles CPU tensors next to NCCL: checkpoint plans and gathered objects.
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    store = _join_store(world, timeout) if _is_launched() else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    return world


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
    if dist.is_initialized():
        dist.destroy_process_group()
        # Models in reference cycles keep process groups alive. Their threads would still run at interpreter exit and
        # sometimes abort the process there (torch 2.13).
        gc.collect()


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
    # For several ranks torchrun sets the variable to 1 by itself, so it says nothing about the user's wish.
    given = os.environ.get("OMP_NUM_THREADS", "") if local_size == 1 else ""
    return int(given) if given.isdigit() and int(given) else max(1, _usable_cores() // local_size)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
