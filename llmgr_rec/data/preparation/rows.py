"""Streams the users' clicks from the scratch database in order, and writes the rows of the splits."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmgr_rec.data.preparation.click_use import ClickUse
from llmgr_rec.data.preparation.database import Database
from llmgr_rec.data.preparation.hold_out import Bools, HeldOutFilter
from llmgr_rec.data.preparation.parts import PartWriter
from llmgr_rec.data.preparation.repeat_counter import RepeatCounter
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.data.preparation.windows import Ints, Windows, gather_ranges, make_windows, phase_ends
from llmgr_rec.data.schema import SPLITS
from llmgr_rec.errors import UserError

# SQL order of the users in the training files, and in the others. Training users are shuffled once by a hash, so that
# shuffling within row groups mixes users of all times. md5 is the same in all versions of DuckDB.
SHUFFLED = "md5_number_lower(CAST(name AS VARCHAR)), key"
INPUT_ORDER = "key"


@dataclass(frozen=True)
class Block:
    """All clicks of some users, in order.

    Args:
        names_U: Names of the users, string.
        offsets_U1: Offsets of the users' clicks.
        items_L: Item index of each click.
        phases_L: Phase of each click.
    """

    names_U: pa.Array
    offsets_U1: Ints
    items_L: Ints
    phases_L: Ints


def stream_blocks(database: Database, order: str) -> Iterator[Block]:
    """Yields all users with their clicks, sorted by (time, row).

    Args:
        database: Scratch database with tables users, events and catalog.
        order: `SHUFFLED` or `INPUT_ORDER`.
    """
    place = f"CAST(row_number() OVER (ORDER BY {order}) AS BIGINT)"
    database.create("places", f"SELECT key, {place} AS place FROM users")
    clicks = database.stream(
        'SELECT p.place, c."index", e.phase FROM events e JOIN places p ON p.key = e.user '
        "JOIN catalog c ON c.key = e.item ORDER BY p.place, e.time, e.row"
    )
    names = _Names(database, order)
    rest: list[Ints] = [np.empty(0, np.int64) for _ in range(3)]
    for batch in clicks:
        columns = [column.to_numpy(zero_copy_only=False).astype(np.int64, copy=False) for column in batch.columns]
        joined = [np.concatenate(pair) for pair in zip(rest, columns, strict=True)]
        # The clicks of the last user may continue in the next batch.
        complete = int(np.searchsorted(joined[0], joined[0][-1], side="left"))
        rest = [column[complete:] for column in joined]
        if complete:
            yield _block([column[:complete] for column in joined], names)
    if len(rest[0]):
        yield _block(rest, names)


def _block(columns: list[Ints], names: "_Names") -> Block:
    places_L, items_L, phases_L = columns
    bounds = np.flatnonzero(np.diff(places_L)) + 1
    offsets_U1 = np.concatenate([[0], bounds, [len(places_L)]])
    return Block(names.take(len(offsets_U1) - 1), offsets_U1, items_L, phases_L)


class _Names:
    """The users' names as a second stream in the order of the clicks. Sorting a name with each click is expensive."""

    def __init__(self, database: Database, order: str) -> None:
        self._batches = database.stream(f"SELECT CAST(name AS VARCHAR) AS name FROM users ORDER BY {order}")
        self._pending = pa.array([], pa.string())

    def take(self, count: int) -> pa.Array:
        """The next `count` names."""
        pieces = [self._pending]
        while sum(map(len, pieces)) < count:
            pieces.append(next(self._batches).column(0))
        joined = pa.concat_arrays(pieces)
        self._pending = joined[count:]
        return joined[:count]


class RowBuilder:
    """Makes rows of blocks and writes them to the splits.

    Args:
        settings: Settings of this run.
        held_out_V: Whether each item of the catalog is held out of training.
    """

    def __init__(self, settings: PrepareSettings, held_out_V: Bools) -> None:
        self._settings = settings
        self.held_out_filter = HeldOutFilter(held_out_V)
        self.click_use = ClickUse(settings, self.held_out_filter)
        self.train_count_V = np.zeros(len(held_out_V), np.int64)
        self.repeat_counter = RepeatCounter()

    def write(self, block: Block, writers: dict[str, PartWriter]) -> None:
        """Writes the rows of a block.

        Args:
            block: Users with their clicks.
            writers: Writer of each split to write.

        Raises:
            UserError: The phases contradict the order of the clicks or the prefix augmentation.
        """
        positional = self._settings.split == "leave_one_out"
        if not positional:
            _check_phase_order(block)
        ends_3U = phase_ends(block.offsets_U1, None if positional else block.phases_L)
        if "train" in writers:
            self.click_use.add(block.offsets_U1, block.items_L, ends_3U)
        for split, writer in writers.items():
            if split == "train" and self._settings.hold_out_items:
                self._write_split(*self._without_held_out(block, ends_3U), split, writer)
            else:
                self._write_split(block, ends_3U, split, writer)

    def _without_held_out(self, block: Block, ends_3U: Ints) -> tuple[Block, Ints]:
        """The training clicks without held-out items as a new block, and the phase ends of its users."""
        offsets_U1, items_L = self.held_out_filter(block.offsets_U1, block.items_L, ends_3U[0])
        remaining = Block(block.names_U, offsets_U1, items_L, np.zeros_like(items_L))
        return remaining, np.stack([offsets_U1[1:]] * len(SPLITS))

    def _write_split(self, block: Block, ends_3U: Ints, split: str, writer: PartWriter) -> None:
        augmented = split in self._settings.augmented_splits
        if augmented and split != "train":
            _check_no_earlier_split(block, ends_3U, SPLITS.index(split))
        windows = make_windows(
            block.offsets_U1,
            ends_3U,
            SPLITS.index(split),
            self._settings.max_length,
            split in self._settings.splits_of_several_rows,
        )
        writer.write(_table(block, windows))
        if split == "train":
            self._count(block, windows)
        self.repeat_counter.add(split, block.offsets_U1, block.items_L, ends_3U, windows, augmented)

    def _count(self, block: Block, windows: Windows) -> None:
        """Counts training clicks; a click that two rows share counts once."""
        start_R = windows.start_R + windows.continues_R
        clicks, _ = gather_ranges(block.items_L, start_R, windows.stop_R + 1)
        # Not bincount, whose cost per block grows with the catalog.
        items, counts = np.unique(clicks, return_counts=True)
        self.train_count_V[items] += counts


def _table(block: Block, windows: Windows) -> list[pa.Array]:
    values, offsets_R1 = gather_ranges(block.items_L, windows.start_R, windows.stop_R)
    return [
        pc.take(block.names_U, pa.array(windows.user_R)),
        pa.ListArray.from_arrays(pa.array(offsets_R1, pa.int32()), pa.array(values)),
        pa.array(block.items_L[windows.stop_R]),
    ]


def _check_phase_order(block: Block) -> None:
    falls = np.diff(block.phases_L) < 0
    falls[block.offsets_U1[1:-1] - 1] = False
    if falls.any():
        user = int(np.searchsorted(block.offsets_U1, int(np.argmax(falls)), side="right")) - 1
        name = block.names_U[user].as_py()
        raise UserError(
            f"the predefined split contradicts the timestamps: session {name!r} has a training click after a "
            "validation or test click, or a validation click after a test click; correct the split or use another"
        )


def _check_no_earlier_split(block: Block, ends_3U: Ints, phase: int) -> None:
    mixed = (ends_3U[phase - 1] > block.offsets_U1[:-1]) & (ends_3U[phase] > ends_3U[phase - 1])
    if mixed.any():
        name = block.names_U[int(np.argmax(mixed))].as_py()
        raise UserError(
            f"--prefix_augmentation all would evaluate on clicks of an earlier split: {SPLITS[phase]} session {name!r} "
            "starts in one; use train or none, or a split by whole sessions"
        )
