"""Reads a split as global batches: the same batches in the same order at any world size, resumable at any step.

The order of an epoch is a permutation of the row groups and, within each row group, of its examples. Both permutations
are functions of the seed and the epoch. Global batch t has the positions t * batch_size .. (t + 1) * batch_size - 1 of
that order, and each rank reads a contiguous slice of it, with about as many rows or clicks as the others. So
(epoch, step) is the complete position of a reader.

Prefixes that are encoded in one pass are examples too, but the rows of a row group are permuted, and the prefixes of a
row follow each other. A row at the end of a batch goes on in the next one, as a pass of its own. A pass is read by one
rank, so that passes, too, are the same at any world size.

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
from llmgr_rec.data.domain_balance import DomainBalance
from llmgr_rec.data.jagged import Jagged, lengths_to_offsets
from llmgr_rec.data.prefixes import grow_prefixes, pass_offsets, prefix_examples, prefix_lengths
from llmgr_rec.data.row_groups import LRUCache, RowGroup, RowGroups
from llmgr_rec.errors import UserError
from llmgr_rec.parent_process import become_worker

T = TypeVar("T")

_PREFETCHED_BATCHES = 4


@dataclass(frozen=True)
class SamplingOrder:
    """What an example is, and the order of the examples in an epoch. The same on all ranks.

    Args:
        batch_size: Examples per global batch, over all ranks. The last batch of an epoch may be smaller.
        shuffle: Whether each epoch has its own random order; otherwise examples come in the order of the files.
        seed: Seed of the random order.
        augment_prefixes: Whether a row (v1 .. vn, target) gives n examples (v1 .. vj -> the next click), or only the
            last of them.
        max_prefixes_per_pass: With `augment_prefixes`, number of prefixes of a row that a model encodes in one pass; a
            longer row takes several passes. 0 encodes each prefix by itself, and draws prefix by prefix.
        whole_rows: With `max_prefixes_per_pass`, whether `batch_size` counts rows, and a batch has all prefixes of its
            rows. Otherwise it counts prefixes, and a row at the end of a batch goes on in the next one.

    Raises:
        UserError: `batch_size` is below 1.
    """

    batch_size: int
    shuffle: bool = False
    seed: int = 0
    augment_prefixes: bool = False
    max_prefixes_per_pass: int = 0
    whole_rows: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; set it to 1 or more")

    @property
    def one_pass(self) -> bool:
        """Whether the prefixes of a row follow each other, to be encoded in one pass."""
        return self.augment_prefixes and self.max_prefixes_per_pass > 0

    @property
    def expands_rows(self) -> bool:
        """Whether examples are rows, which are expanded to all of their prefixes."""
        return self.one_pass and self.whole_rows

    @property
    def cuts_rows(self) -> bool:
        """Whether examples are prefixes that follow each other, so that a row may go on in the next batch."""
        return self.one_pass and not self.whole_rows

    @property
    def by_click(self) -> bool:
        """Whether each click of a row is an example; otherwise each row is one."""
        return self.augment_prefixes and not self.expands_rows

    def generator(self, *numbers: int) -> np.random.Generator:
        """A random generator seeded by the seed of the order and the given numbers."""
        return np.random.default_rng([self.seed % (1 << 64), *numbers])


@dataclass(frozen=True)
class DataShard:
    """The part of each global batch that this process reads.

    Args:
        rank: Rank of this process.
        world_size: Number of ranks.
        with_global_batch: Whether raw sessions also carry the rows of all ranks, see `RawSessions.global_batch`.
        balanced: Whether ranks get about the same number of clicks of a batch; otherwise of rows.

    Raises:
        ValueError: `rank` is not in 0 .. world_size - 1.
    """

    rank: int = 0
    world_size: int = 1
    with_global_batch: bool = False
    balanced: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not within a world of {self.world_size}")

    def slice(self, global_size: int) -> tuple[int, int]:
        """First row of this rank in a global batch of `global_size` rows, and the row after its last one."""
        return self.rank * global_size // self.world_size, (self.rank + 1) * global_size // self.world_size

    def slice_by_clicks(self, clicks_G: np.ndarray) -> tuple[int, int]:
        """As `slice`, cut where ranks have about the same work; each has a row if there are enough.

        Args:
            clicks_G: Number of clicks of each row of a global batch of G rows. A row is also some work without them.
        """
        size, world = len(clicks_G), self.world_size
        if size < world:
            return self.slice(size)
        before_G1 = np.concatenate([[0], np.cumsum(clicks_G + 1)])
        wanted_W1 = before_G1[-1] * np.arange(world + 1) / world
        cuts_W1 = np.minimum(np.searchsorted(before_G1, wanted_W1), size)
        # The nearer one of the two rows between which the cut falls.
        previous_W1 = np.maximum(cuts_W1 - 1, 0)
        cuts_W1 -= wanted_W1 - before_G1[previous_W1] < before_G1[cuts_W1] - wanted_W1
        # A row for each rank before the cut, and after it.
        ranks_W1 = np.arange(world + 1)
        cuts_W1 = np.maximum.accumulate(np.clip(cuts_W1 - ranks_W1, 0, size - world)) + ranks_W1
        return int(cuts_W1[self.rank]), int(cuts_W1[self.rank + 1])


@dataclass(frozen=True)
class Prefetch:
    """How batches are prepared ahead of their use.

    Args:
        workers: Worker processes; 0 prepares batches in a thread of this process.
        pin_memory: Whether batches are copied to page-locked memory, for asynchronous copies to a GPU.
    """

    workers: int = 0
    pin_memory: bool = False


class SessionReader(Generic[T]):
    """Iterates over this rank's part of every global batch of a split.

    Args:
        parts: Part files of the split.
        num_items: Number of items V in the catalog; item indices are checked against it.
        collate: Makes a batch of the raw sessions. Runs in the worker processes, or in the prefetching thread.
        order: Batch size and order of the examples.
        shard: This rank's part of the data.
        prefetch: How batches are prepared ahead of their use.
        balance: How often a shuffled epoch has the examples of each domain; None once each.

    Raises:
        UserError: The split is empty, or a file is unreadable, lacks a column, or has a null or an index out of range.
    """

    def __init__(
        self,
        parts: list[Path],
        *,
        num_items: int,
        collate: Callable[[RawSessions], T],
        order: SamplingOrder,
        shard: DataShard = DataShard(),
        prefetch: Prefetch = Prefetch(),
        balance: DomainBalance | None = None,
    ) -> None:
        self.order = order
        self.balance = balance
        self.groups = RowGroups(parts, num_items=num_items, by_click=order.by_click)
        if not self.groups.num_examples:
            folder = f" in {Path(parts[0]).parent}" if parts else ""
            raise UserError(f"the split has no sessions{folder}; prepare the data set from more interactions")
        self.epoch = 0
        self.step = 0
        self._collate = collate
        self._shard = shard
        self._prefetch = prefetch
        self._epoch_orders: LRUCache[int, tuple[np.ndarray, np.ndarray]] = LRUCache(max_size=1)
        self._group_orders: LRUCache[tuple[int, int], Tensor] = LRUCache(max_size=2)
        # One thread for all epochs, so that its state needs no lock.
        self._thread = ThreadPoolExecutor(1, "reader")

    @property
    def num_examples(self) -> int:
        """Examples of an epoch over all ranks; rows if a batch has all prefixes of its rows."""
        return self.groups.num_examples

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch."""
        return -(-self.num_examples // self.order.batch_size)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[T]:
        """Reads an epoch from a given step to its end.

        The reader's position counts the batches that were yielded, not those that were prefetched.

        Args:
            epoch: Epoch, from 0.
            start_step: First global batch.
        """
        steps = range(start_step, self.steps_per_epoch)
        self.epoch, self.step = epoch, start_step
        for batch in self._from_workers(epoch, steps) if self._prefetch.workers else self._from_thread(epoch, steps):
            self.step += 1
            yield batch

    def _from_workers(self, epoch: int, steps: range) -> Iterator[T]:
        loader: DataLoader[Any] = DataLoader(
            _Steps(self, epoch),
            batch_size=None,
            sampler=steps,
            num_workers=self._prefetch.workers,
            prefetch_factor=_PREFETCHED_BATCHES,
            collate_fn=_identity,
            pin_memory=self._prefetch.pin_memory,
            worker_init_fn=_start_worker,
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _from_thread(self, epoch: int, steps: range) -> Iterator[T]:
        pending: deque[Future[T]] = deque()
        try:
            for step in steps:
                pending.append(self._thread.submit(self._pinned, epoch, step))
                if len(pending) > _PREFETCHED_BATCHES:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def _pinned(self, epoch: int, step: int) -> T:
        batch: Any = self.collated(epoch, step)
        return batch.pin_memory() if self._prefetch.pin_memory else batch

    def state_dict(self) -> dict[str, Any]:
        """The position as plain values: epoch, step, and a fingerprint of what must not change on resume."""
        return {"epoch": self.epoch, "step": self.step, "fingerprint": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a position, at any world size and number of workers.

        Args:
            state: From `state_dict`. Continue with `batches(reader.epoch, reader.step)`.

        Raises:
            UserError: The files or the sampling order differ from those of the state.
        """
        now = self._fingerprint()
        # Older states have no such entry.
        recorded = {"whole_rows": True} | state["fingerprint"]
        for name in {**now, **recorded}:
            was, found = recorded.get(name), now.get(name)
            if was != found:
                what = "the training files have changed" if name == "files" else f"{name} was {was}, is {found}"
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
            "whole_rows": not order.cuts_rows,
            **({} if self.balance is None else {"domain_power": self.balance.power}),
        }

    def collated(self, epoch: int, step: int) -> T:
        """This rank's part of global batch `step`, collated."""
        return self._collate(self.raw(epoch, step))

    def raw(self, epoch: int, step: int) -> RawSessions:
        """This rank's slice of global batch `step`; a filler row if the slice is empty."""
        order = self.order
        first = step * order.batch_size
        global_size = min(order.batch_size, self.num_examples - first)
        start, stop = self._slice(epoch, first, global_size)
        raw = self._read(epoch, first + start, first + stop)
        raw = replace(raw, global_size=global_size, step=step, epoch=epoch)
        if self._shard.with_global_batch:
            global_batch = raw if stop - start == global_size else self._read(epoch, first, first + global_size)
            global_batch = replace(global_batch, global_size=global_size, step=step, epoch=epoch)
            raw = replace(raw, global_batch=global_batch)
        if order.expands_rows:
            return grow_prefixes(raw, order.max_prefixes_per_pass, self._num_clicks(epoch, first, first + global_size))
        return raw

    def _slice(self, epoch: int, first: int, global_size: int) -> tuple[int, int]:
        """This rank's rows of the global batch at positions first .. first + global_size - 1 of the epoch's order."""
        if self._shard.world_size > 1 and self.order.cuts_rows:
            return self._whole_passes(epoch, first, global_size)
        if self._shard.world_size > 1 and self._shard.balanced:
            examples = self._examples(epoch, first, first + global_size)
            lengths = [self._lengths(group, numbers) for group, numbers in examples]
            return self._shard.slice_by_clicks(torch.cat(lengths).numpy())
        return self._shard.slice(global_size)

    def _lengths(self, group: int, examples: Tensor) -> Tensor:
        """Number of clicks of examples of a row group."""
        rows = self.groups[group].items
        return prefix_lengths(rows, examples) if self.order.by_click else rows.lengths[examples]

    def _whole_passes(self, epoch: int, first: int, global_size: int) -> tuple[int, int]:
        """This rank's slice of a global batch, moved to the starts of passes."""
        clicks, lengths = [], []
        for group, examples in self._examples(epoch, first, first + global_size):
            clicks.append(examples + self.groups.first_example[group])
            lengths.append(prefix_lengths(self.groups[group].items, examples))
        starts_P1 = pass_offsets(torch.cat(clicks), torch.cat(lengths), self.order.max_prefixes_per_pass).numpy()
        start, stop = (starts_P1[np.searchsorted(starts_P1, end)] for end in self._shard.slice(global_size))
        return int(start), int(stop)

    def _read(self, epoch: int, start: int, stop: int) -> RawSessions:
        """Positions start .. stop - 1 of the epoch's order."""
        if start == stop:
            return self._with_passes(_filler())
        by_group = [
            (*_select(self.groups[group], examples, self.order.by_click), examples + self.groups.first_example[group])
            for group, examples in self._examples(epoch, start, stop)
        ]
        sessions, targets, rows = zip(*by_group, strict=True)
        raw = RawSessions(
            items_L=torch.cat([clicks.values for clicks in sessions]),
            offsets_B1=lengths_to_offsets(torch.cat([clicks.lengths for clicks in sessions])),
            targets_B=torch.cat(targets),
            weights_B=torch.ones(stop - start),
            rows_B=torch.cat(rows),
            global_size=stop - start,
        )
        return self._with_passes(raw)

    def _with_passes(self, raw: RawSessions) -> RawSessions:
        """The examples in passes, if they are prefixes that are encoded in one pass."""
        order = self.order
        if not order.cuts_rows:
            return raw
        lengths_B = raw.offsets_B1.diff()
        return replace(raw, pass_offsets_P1=pass_offsets(raw.rows_B, lengths_B, order.max_prefixes_per_pass))

    def _num_clicks(self, epoch: int, start: int, stop: int) -> int:
        """Number of clicks of the rows at positions start .. stop - 1 of the epoch's order."""
        by_group = self._examples(epoch, start, stop)
        return sum(int(self.groups[group].items.lengths[rows].sum()) for group, rows in by_group)

    def _examples(self, epoch: int, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Row groups and example numbers within them at positions start .. stop - 1 of the epoch's order."""
        groups, ends = self._epoch_orders.get(epoch, self._make_epoch_order)
        position = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            group, end = int(groups[position]), int(ends[position])
            begin = end - int(self.groups.sizes[group])
            order = self._group_orders.get((epoch, group), self._make_group_order)
            yield group, order[start - begin : min(stop, end) - begin]
            start, position = end, position + 1

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
        generator = self.order.generator(epoch, group)
        if self.order.cuts_rows:
            rows = self.groups[group].items
            shuffled_R = torch.from_numpy(self._shuffled(rows, rows.lengths, generator))
            return Jagged(torch.arange(count), rows.offsets).select(shuffled_R).values[:count]
        if self.balance is None:
            return torch.from_numpy(generator.permutation(count))
        rows = self.groups[group].items
        examples = rows if not self.order.by_click else Jagged(rows.values, torch.arange(count + 1))
        return torch.from_numpy(self._shuffled(examples, torch.ones(count, dtype=torch.int64), generator)[:count])

    def _shuffled(self, rows: Jagged, sizes_R: Tensor, generator: np.random.Generator) -> np.ndarray:
        """Rows in random order, as often as the balance of domains has them."""
        if self.balance is None:
            return generator.permutation(rows.num_rows)
        return self.balance.order(rows.values[rows.offsets[:-1]].numpy(), sizes_R.numpy(), generator)


class _Steps(Dataset[Any]):
    """The steps of an epoch as a map-style data set, which a DataLoader reads in order with any number of workers."""

    def __init__(self, reader: SessionReader[Any], epoch: int) -> None:
        self._reader = reader
        self._epoch = epoch

    def __getitem__(self, step: int) -> Any:
        # Returned, because a raised error would reach the main process wrapped in the stack trace of the worker.
        try:
            return self._reader.collated(self._epoch, step)
        except UserError as error:
            return error


def _start_worker(index: int) -> None:
    become_worker()


def _identity(batch: T) -> T:
    return batch


def _select(group: RowGroup, examples: Tensor, by_click: bool) -> tuple[Jagged, Tensor]:
    """Clicks and targets of examples of a row group."""
    if by_click:
        return prefix_examples(group.items, group.targets_R, examples)
    return group.items.select(examples), group.targets_R[examples]


def _filler() -> RawSessions:
    """One row of weight 0, so that a rank without rows takes part in the collective operations of the step."""
    return RawSessions(
        items_L=torch.zeros(1, dtype=torch.int64),
        offsets_B1=torch.tensor([0, 1]),
        targets_B=torch.zeros(1, dtype=torch.int64),
        weights_B=torch.zeros(1),
        rows_B=torch.full((1,), -1),
        global_size=0,
    )
