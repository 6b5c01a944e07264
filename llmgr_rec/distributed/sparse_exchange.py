"""Sparse matrices that are sent from rank to rank.

Shapes: R rows of a matrix.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import DTypeLike
from scipy import sparse

_Group = dist.ProcessGroup | None
T = TypeVar("T")


def send(matrix: sparse.csr_array, to: int, group: _Group) -> Callable[[], None]:
    """Begins to send a matrix to a rank, which calls `receive`.

    Args:
        matrix: The matrix, with fewer than 2^31 columns; it must not change before the result was called.
        to: The rank.
        group: Group of all ranks on the CPU.

    Returns:
        A function that waits for the end.
    """
    lengths_R = np.diff(matrix.indptr).astype(np.int32)
    arrays = [lengths_R, matrix.indices.astype(np.int32, copy=False), matrix.data]
    parts = [torch.tensor([*matrix.shape, matrix.nnz]), *map(torch.from_numpy, arrays)]
    works = [dist.isend(part, to, group) for part in parts if part.numel()]

    def wait() -> None:
        for work in works:
            if work is not None:
                work.wait()

    return wait


def receive(source: int, dtype: DTypeLike, group: _Group) -> sparse.csr_array:
    """Receives a matrix of a rank that calls `send`.

    Args:
        source: The rank.
        dtype: Type of its values.
        group: Group of all ranks on the CPU.
    """
    header = torch.empty(3, dtype=torch.int64)
    dist.recv(header, source, group)
    rows, columns, entries = header.tolist()
    arrays = [np.empty(rows, np.int32), np.empty(entries, np.int32), np.empty(entries, dtype)]
    for array in arrays:
        if len(array):
            dist.recv(torch.from_numpy(array), source, group)
    lengths_R, indices, values = arrays
    offsets = np.concatenate([[0], np.cumsum(lengths_R, dtype=np.int64)])
    return sparse.csr_array((values, indices, offsets), shape=(rows, columns))


def pass_on(matrix: sparse.csr_array, to: int, source: int, group: _Group) -> sparse.csr_array:
    """Sends a matrix to one rank while it receives that of another; all ranks call together.

    Args:
        matrix: The matrix, with values of one type on all ranks.
        to: Rank that gets it.
        source: Rank whose matrix is received.
        group: Group of all ranks on the CPU.
    """
    wait = send(matrix, to, group)
    received = receive(source, matrix.dtype, group)
    wait()
    return received


def through_ranks(start: T, add: Callable[[T], T], rank: int, size: int, group: _Group) -> T:
    """Passes a value through the ranks in their order, each of which adds to it; all ranks call together.

    Args:
        start: The value before rank 0; pickled where it is sent.
        add: What a rank makes of the value of the rank before it.
        rank: This rank.
        size: Number of ranks.
        group: Group of all ranks on the CPU.

    Returns:
        The value after this rank.
    """
    box: list[Any] = [start]
    if rank:
        dist.recv_object_list(box, rank - 1, group, device=torch.device("cpu"))
    value = add(box[0])
    if rank + 1 < size:
        dist.send_object_list([value], rank + 1, group, device=torch.device("cpu"))
    return value
