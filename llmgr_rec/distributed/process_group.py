"""The process group: which rank this process is, on which device, with how many threads."""

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

_STORE_PORT = "llmgr_rec/store_port"
# Seconds that rank 0 has to answer a call, and between two calls.
_ANSWER_S, _RETRY_S = 5.0, 0.05
# Longest wait for a rank's work of which nobody knows how long it takes.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class World:
    """Where this process stands among all processes of the run.

    Args:
        rank: Number of this process, from 0.
        size: Processes in all.
        local_size: Processes on this machine.
        device: Where this process computes.
    """

    rank: int
    size: int
    local_size: int
    device: torch.device

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> "World":
        """A process by itself."""
        return cls(0, 1, 1, torch.device(device))


def init_distributed(device: Device, timeout_s: int, threads: int = 0) -> World:
    """Joins the process group that torchrun describes in the environment, or makes one of a single process.

    Args:
        device: `auto` takes CUDA where there is one.
        timeout_s: Longest wait for another rank, in seconds.
        threads: CPU threads of this rank; 0 divides the machine's cores among its ranks.

    Raises:
        UserError: CUDA was asked for and there is none, or there are more local ranks than GPUs.
    """
    world = launched_world(device)
    torch.set_num_threads(threads or max(1, _usable_cores() // world.local_size))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    # Gloo beside NCCL carries what lives on the CPU: checkpoints' plans and gathered objects.
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    store = _join_store(world, timeout) if _is_launched() else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    return world


def _join_store(world: World, timeout: timedelta) -> dist.Store:
    """The store through which the ranks of this attempt find each other.

    torchrun's agent keeps one store over all restarts, and in it the addresses of ranks that are dead by now, which the
    new ranks would call (torch 2.13). So rank 0 opens a new one and tells its port through the old. A port told before
    a restart does not answer, because all ranks have ended before any is started anew.
    """
    shared: dist.Store
    shared, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return shared
    host = os.environ["MASTER_ADDR"]
    if world.rank == 0:
        own = dist.TCPStore(host, 0, world.size, is_master=True, timeout=timeout, wait_for_workers=False)
        shared.set(_STORE_PORT, str(own.port))
        return own
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        port = int(shared.get(_STORE_PORT))
        try:
            socket.create_connection((host, port), timeout=_ANSWER_S).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S)
        else:
            return dist.TCPStore(host, port, world.size, is_master=False, timeout=timeout)


def launched_world(device: Device) -> World:
    """Where torchrun's environment puts this process, told without waiting for any other; a single one without it.

    Args:
        device: `auto` takes CUDA where there is one.

    Raises:
        UserError: CUDA was asked for and there is none, or there are more local ranks than GPUs.
    """
    if not _is_launched():
        return World.alone(choose_device(device))
    size, local_rank = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return World(int(os.environ["RANK"]), size, local_size, choose_device(device, local_rank))


def choose_device(device: Device, local_rank: int = 0) -> torch.device:
    """The device of a local rank.

    Args:
        device: `auto` takes CUDA where there is one.
        local_rank: Number of the process on its machine: the number of its GPU.

    Raises:
        UserError: There is no such GPU.
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
    """Leaves the process group, where there is one, and ends its threads."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # Models that stand in cycles of references hold groups, whose threads would be there when Python ends: at times
        # one of them aborts the process then, after all is done (torch 2.13).
        gc.collect()


@contextmanager
def patient_group(world: World) -> Iterator[dist.ProcessGroup | None]:
    """A group of all ranks that waits longer than `timeout_s`, for a rank's work that may take hours; all must call.

    A rank that ends is noticed all the same: its connections break, and the launcher stops the others. Alone there is
    nobody to wait for, and no group.
    """
    group = dist.new_group(backend="gloo", timeout=_PATIENCE) if world.size > 1 else None
    try:
        yield group
    finally:
        if group is not None:
            dist.destroy_process_group(group)


def together(world: World, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs work that may fail on one rank only, and lets it fail on all: no rank is left waiting for another.

    Args:
        world: Ranks; all must call.
        work: Work without collective calls of its own.
        group: Group that the ranks wait in for each other; None takes the run's own.

    Returns:
        This rank's own result.

    Raises:
        UserError: The first rank's (in rank order) user error.
        RuntimeError: Another rank failed with another exception; a rank's own exception is raised as it is.
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


def on_first_rank(world: World, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs work on rank 0 and hands its result, or its failure, to every rank.

    Args:
        world: Ranks; all must call.
        work: Work without collective calls of its own; its result is pickled between this run's own processes.
        group: Group that the ranks wait in for rank 0; None takes the run's own.

    Raises:
        UserError: Rank 0's user error, on all ranks.
        RuntimeError: Rank 0 failed with another exception.
    """
    result = together(world, work if world.rank == 0 else lambda: None, group)
    if world.size == 1:
        return result  # type: ignore[return-value]
    box = [result]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]  # type: ignore[return-value]


def barrier(world: World, group: dist.ProcessGroup | None = None) -> None:
    """Waits until every rank is here.

    Args:
        world: Ranks.
        group: Group that they wait in; None takes the run's own.
    """
    if world.size > 1:
        dist.barrier(group)


def _is_launched() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
