"""Reads a split as global batches: the same batches in the same order at any world size, resumable to the row.

The order of an epoch is a permutation of the row groups and, within each, of its examples, both functions of the seed
and the epoch. Global batch t holds positions t * batch_size .. (t + 1) * batch_size - 1 of that order and every rank
takes a contiguous slice of it. So (epoch, step) says everything about the position.

Shapes: B sessions of this rank's slice, L clicks.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.jagged import Jagged, lengths_to_offsets
from llmgr_rec.data.prefixes import grow_prefixes, prefix_examples
from llmgr_rec.data.row_groups import Recent, RowGroup, RowGroups
from llmgr_rec.errors import UserError

T = TypeVar("T")

_PREFETCHED_BATCHES = 4


@dataclass(frozen=True)
class ReadOrder:
    """What decides which examples a rank reads at which step.

    Args:
        batch_size: Examples of a global batch, over all ranks.
        rank: This rank.
        world_size: Number of ranks.
        shuffle: Whether each epoch has its own random order; otherwise it is the order of the files.
        seed: Seed of the order.
        augment_prefixes: Whether a row stands for an example of each of its prefixes, or for one example.
        max_prefixes_per_pass: With prefix augmentation, the most prefixes of a row that form one pass; 0 makes
            separate examples. Otherwise batches count rows, not examples.
    """

    batch_size: int
    rank: int
    world_size: int
    shuffle: bool
    seed: int
    augment_prefixes: bool
    max_prefixes_per_pass: int = 0

    @property
    def by_click(self) -> bool:
        """Whether each click is drawn for itself, or each row."""
        return self.augment_prefixes and not self.max_prefixes_per_pass

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; set it to 1 or more")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not within a world of {self.world_size}")

    def generator(self, *numbers: int) -> np.random.Generator:
        """A generator of random numbers that depends on the seed and the given numbers only."""
        return np.random.default_rng([self.seed % (1 << 64), *numbers])


class SessionReader(Generic[T]):
    """Hands out this rank's part of every global batch of a split.

    Args:
        parts: Part files of the split.
        num_items: Size V of the catalogue, against which indices are checked.
        batch_size: Examples of a global batch, over all ranks; the last one of an epoch may be smaller.
        rank: This rank.
        world_size: Number of ranks.
        shuffle: Whether each epoch has its own random order; otherwise it is the order of the files.
        seed: Seed of the order.
        augment_prefixes: Whether a row (v1 .. vn, target) stands for the n examples (v1 .. vj -> the click that
            followed), or for the last of them alone.
        max_prefixes_per_pass: With prefix augmentation, the most prefixes of a row that form one pass; 0 makes
            separate examples. Otherwise `batch_size` counts rows, and a longer row has several passes.
        whole_batches: Whether `collate` gets the rows of all ranks beside its own, see `RawSessions.whole`.
        collate: Makes a batch of the raw sessions; runs in the worker processes, or in the thread.
        workers: Processes that read ahead; 0 reads ahead in a thread of this process.
        pin_memory: Whether batches are copied to page-locked memory, for copies to a GPU that do not block.

    Raises:
        UserError: No examples, or a file that cannot be read, lacks a column, or holds a null or an index out of range.
    """

    def __init__(
        self,
        parts: list[Path],
        *,
        num_items: int,
        batch_size: int,
        collate: Callable[[RawSessions], T],
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        augment_prefixes: bool = False,
        max_prefixes_per_pass: int = 0,
        whole_batches: bool = False,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.order = ReadOrder(batch_size, rank, world_size, shuffle, seed, augment_prefixes, max_prefixes_per_pass)
        self.groups = RowGroups(parts, num_items=num_items, by_click=self.order.by_click)
        if not self.groups.num_examples:
            folder = f" in {Path(parts[0]).parent}" if parts else ""
            raise UserError(f"the split has no sessions{folder}; prepare the data set from more interactions")
        self.epoch = 0
        self.step = 0
        self._collate = collate
        self._whole_batches = whole_batches
        self._workers = workers
        self._pin_memory = pin_memory
        self._epoch_orders = Recent(self._make_epoch_order, keep=1)
        self._group_orders = Recent(self._make_group_order, keep=2)
        # One thread for all epochs: what it shares with nobody needs no lock.
        self._thread = ThreadPoolExecutor(1, "reader")

    @property
    def num_examples(self) -> int:
        """Examples of an epoch, or rows where prefixes form passes, over all ranks."""
        return self.groups.num_examples

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch."""
        return -(-self.num_examples // self.order.batch_size)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[T]:
        """Reads the rest of an epoch.

        The reader's position follows the batches as they are handed out, however far has been read ahead.

        Args:
            epoch: Number of the epoch, from 0.
            start_step: First global batch.
        """
        steps = range(start_step, self.steps_per_epoch)
        self.epoch, self.step = epoch, start_step
        for batch in self._from_workers(epoch, steps) if self._workers else self._from_thread(epoch, steps):
            self.step += 1
            yield batch

    def _from_workers(self, epoch: int, steps: range) -> Iterator[T]:
        loader: DataLoader[Any] = DataLoader(
            _Steps(self, epoch),
            batch_size=None,
            sampler=steps,
            num_workers=self._workers,
            prefetch_factor=_PREFETCHED_BATCHES,
            collate_fn=_as_it_is,
            pin_memory=self._pin_memory,
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _from_thread(self, epoch: int, steps: range) -> Iterator[T]:
        ahead: deque[Future[T]] = deque()
        try:
            for step in steps:
                ahead.append(self._thread.submit(self._pinned, epoch, step))
                if len(ahead) > _PREFETCHED_BATCHES:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def _pinned(self, epoch: int, step: int) -> T:
        batch: Any = self.collated(epoch, step)
        return batch.pin_memory() if self._pin_memory else batch

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain values: epoch, step, and what must be the same when it is taken up again."""
        return {"epoch": self.epoch, "step": self.step, "fingerprint": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a position, at any world size and number of workers.

        Args:
            state: From `state_dict`. Continue with `batches(reader.epoch, reader.step)`.

        Raises:
            UserError: The files, the batch size or the order are not those of the state.
        """
        now = self._fingerprint()
        for name, before in state["fingerprint"].items():
            if now[name] != before:
                what = "the training files have changed" if name == "files" else f"{name} was {before}, is {now[name]}"
                raise UserError(f"cannot resume within the epoch: {what}; restore it or start a new run")
        self.epoch, self.step = int(state["epoch"]), int(state["step"])

    def _fingerprint(self) -> dict[str, Any]:
        order = self.order
        return {
            "files": self.groups.fingerprint(),
            "batch_size": order.batch_size,
            "shuffle": order.shuffle,
            "seed": order.seed,
            "augment_prefixes": order.augment_prefixes,
            "max_prefixes_per_pass": order.max_prefixes_per_pass,
        }

    def collated(self, epoch: int, step: int) -> T:
        """This rank's part of global batch `step`, collated."""
        return self._collate(self.raw(epoch, step))

    def raw(self, epoch: int, step: int) -> RawSessions:
        """This rank's slice of global batch `step`; a filler row where the slice is empty."""
        order = self.order
        first = step * order.batch_size
        global_size = min(order.batch_size, self.num_examples - first)
        start = first + order.rank * global_size // order.world_size
        stop = first + (order.rank + 1) * global_size // order.world_size
        raw = replace(self._read(epoch, start, stop), global_size=global_size, step=step, epoch=epoch)
        if self._whole_batches:
            whole = raw if stop - start == global_size else self._read(epoch, first, first + global_size)
            raw = replace(raw, whole=replace(whole, global_size=global_size, step=step, epoch=epoch))
        if order.augment_prefixes and order.max_prefixes_per_pass:
            return grow_prefixes(raw, order.max_prefixes_per_pass, self._clicks(epoch, first, first + global_size))
        return raw

    def _read(self, epoch: int, start: int, stop: int) -> RawSessions:
        """Positions start .. stop - 1 of the epoch's order."""
        if start == stop:
            return _filler()
        pieces = [
            (*_cut(self.groups[group], examples, self.order.by_click), examples + self.groups.first_example[group])
            for group, examples in self._examples(epoch, start, stop)
        ]
        items, targets, rows = zip(*pieces, strict=True)
        return RawSessions(
            items_L=torch.cat([piece.values for piece in items]),
            offsets_B1=lengths_to_offsets(torch.cat([piece.lengths for piece in items])),
            targets_B=torch.cat(targets),
            weights_B=torch.ones(stop - start),
            rows_B=torch.cat(rows),
            global_size=stop - start,
        )

    def _clicks(self, epoch: int, start: int, stop: int) -> int:
        """Clicks of the rows at positions start .. stop - 1 of the epoch's order."""
        pieces = self._examples(epoch, start, stop)
        return sum(int(self.groups[group].items.lengths[rows].sum()) for group, rows in pieces)

    def _examples(self, epoch: int, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Row groups and example numbers within them at positions start .. stop - 1 of the epoch's order."""
        groups, ends = self._epoch_orders(epoch)
        place = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            group, end = int(groups[place]), int(ends[place])
            begin = end - int(self.groups.sizes[group])
            yield group, self._group_orders((epoch, group))[start - begin : min(stop, end) - begin]
            start, place = end, place + 1

    def _make_epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Row groups in the epoch's order, and the position after the last example of each."""
        count = len(self.groups)
        groups = self.order.generator(epoch).permutation(count) if self.order.shuffle else np.arange(count)
        return groups, np.cumsum(self.groups.sizes[groups])

    def _make_group_order(self, key: tuple[int, int]) -> Tensor:
        """Example numbers of a row group in the epoch's order."""
        epoch, group = key
        count = int(self.groups.sizes[group])
        if not self.order.shuffle:
            return torch.arange(count)
        return torch.from_numpy(self.order.generator(epoch, group).permutation(count))


class _Steps(Dataset[Any]):
    """The steps of an epoch as a map-style data set, whose order a DataLoader keeps with any number of workers."""

    def __init__(self, reader: SessionReader[Any], epoch: int) -> None:
        self._reader = reader
        self._epoch = epoch

    def __getitem__(self, step: int) -> Any:
        # A raised error would reach the main process wrapped in the worker's stack trace.
        try:
            return self._reader.collated(self._epoch, step)
        except UserError as error:
            return error


def _as_it_is(batch: T) -> T:
    return batch


def _cut(group: RowGroup, examples: Tensor, by_click: bool) -> tuple[Jagged, Tensor]:
    """Clicks and targets of examples of a row group."""
    if by_click:
        return prefix_examples(group.items, group.targets_R, examples)
    return group.items.select(examples), group.targets_R[examples]


def _filler() -> RawSessions:
    """One row of weight 0, so that a rank without rows takes part in the step's collective calls."""
    return RawSessions(
        items_L=torch.zeros(1, dtype=torch.int64),
        offsets_B1=torch.tensor([0, 1]),
        targets_B=torch.zeros(1, dtype=torch.int64),
        weights_B=torch.zeros(1),
        rows_B=torch.full((1,), -1),
        global_size=0,
    )
