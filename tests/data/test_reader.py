import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from threading import Semaphore, current_thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.reader import DataShard, Prefetch, SamplingOrder, SessionReader
from llmgr_rec.data.row_groups import LRUCache, RowGroup
from llmgr_rec.errors import UserError

from .files import Session, prefix_examples, random_sessions, write_part, write_parts

NUM_ITEMS = 11

Row = tuple[int, list[int], int]
Make = Callable[..., "SessionReader[RawSessions]"]


def identity(raw: RawSessions) -> RawSessions:
    return raw


def reader_of(
    parts: list[Path],
    num_items: int = NUM_ITEMS,
    collate: Callable[[RawSessions], RawSessions] = identity,
    **options: Any,
) -> "SessionReader[RawSessions]":
    """A reader whose options are given without the objects that group them."""
    groups = [
        kind(**{field.name: options.pop(field.name) for field in fields(kind) if field.name in options})
        for kind in (SamplingOrder, DataShard, Prefetch)
    ]
    assert not options, options
    order, shard, prefetch = groups
    return SessionReader(parts, num_items=NUM_ITEMS, collate=collate, order=order, shard=shard, prefetch=prefetch)


@pytest.fixture
def sessions() -> list[Session]:
    return random_sessions(61, NUM_ITEMS)


@pytest.fixture
def make(tmp_path: Path, sessions: list[Session]) -> Make:
    parts = write_parts(tmp_path / "train", sessions, [20, 1, 17])

    def make(**settings: object) -> "SessionReader[RawSessions]":
        return reader_of(parts, **{"batch_size": 7, **settings})

    return make


def rows_of(raw: RawSessions) -> list[Row]:
    """(row number, clicks, target) of every real row."""
    clicks = torch.split(raw.items_L, raw.offsets_B1.diff().tolist())
    return [
        (row, part.tolist(), target)
        for row, part, target, weight in zip(
            raw.rows_B.tolist(), clicks, raw.targets_B.tolist(), raw.weights_B.tolist(), strict=True
        )
        if weight
    ]


def numbered(examples: list[Session]) -> list[Row]:
    return [(number, items, target) for number, (items, target) in enumerate(examples)]


def global_batches(
    make: Make, world_size: int, epoch: int = 0, start_step: int = 0, **settings: object
) -> list[list[Row]]:
    """Global batches as the ranks put them together."""
    ranks = [make(rank=rank, world_size=world_size, **settings) for rank in range(world_size)]
    streams = [list(reader.batches(epoch, start_step)) for reader in ranks]
    assert len({len(stream) for stream in streams}) == 1
    return [[row for raw in raws for row in rows_of(raw)] for raws in zip(*streams, strict=True)]


def test_without_shuffle_rows_come_in_file_order(make: Make, sessions: list[Session]) -> None:
    batches = global_batches(make, 1)

    assert [row for batch in batches for row in batch] == numbered(sessions)
    assert [len(batch) for batch in batches] == [7] * 8 + [5]


def test_prefix_augmentation_equals_naive_expansion(make: Make, sessions: list[Session]) -> None:
    examples = prefix_examples(sessions)
    reader = make(augment_prefixes=True)

    assert reader.num_examples == len(examples)
    assert reader.steps_per_epoch == -(-len(examples) // 7)
    assert [row for raw in reader.batches(0) for row in rows_of(raw)] == numbered(examples)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 16, 1000])
@pytest.mark.parametrize("augment_prefixes", [False, True])
def test_every_example_is_read_once_over_all_ranks(
    make: Make, sessions: list[Session], world_size: int, batch_size: int, augment_prefixes: bool
) -> None:
    settings = {"batch_size": batch_size, "shuffle": True, "augment_prefixes": augment_prefixes}
    examples = prefix_examples(sessions) if augment_prefixes else sessions

    batches = global_batches(make, world_size, epoch=3, **settings)

    assert sorted(row for batch in batches for row in batch) == numbered(examples)
    assert batches == global_batches(make, 1, epoch=3, **settings)


@pytest.mark.parametrize("augment_prefixes", [False, True])
def test_balanced_ranks_read_the_same_batches(make: Make, augment_prefixes: bool) -> None:
    settings = {"batch_size": 16, "shuffle": True, "augment_prefixes": augment_prefixes}
    assert global_batches(make, 3, balanced=True, **settings) == global_batches(make, 1, **settings)

    def largest(balanced: bool) -> float:
        """Clicks of the rank with most of them, over those of all, in the mean."""
        ranks = [make(rank=rank, world_size=3, balanced=balanced, **settings) for rank in range(3)]
        clicks = torch.tensor([[len(raw.items_L) for raw in reader.batches(0)] for reader in ranks]).double()
        return float((clicks.amax(0) / clicks.sum(0)).mean())

    assert largest(balanced=True) < 0.97 * largest(balanced=False)


@given(clicks=st.lists(st.integers(0, 50), min_size=1, max_size=40), world_size=st.integers(1, 12))
def test_cuts_by_clicks_are_near_equal_shares(clicks: list[int], world_size: int) -> None:
    slices = [DataShard(rank, world_size).slice_by_clicks(np.array(clicks)) for rank in range(world_size)]
    assert slices[0][0] == 0
    assert slices[-1][1] == len(clicks)
    assert all(end == start for (_, end), (start, _) in pairwise(slices))
    if len(clicks) < world_size:
        return
    assert all(end > start for start, end in slices)
    work = [sum(clicks[start:end]) + end - start for start, end in slices]
    # A cut is at most half a row from its place, or where it is to leave a row to each rank.
    assert max(work) <= (sum(clicks) + len(clicks)) / world_size + max(clicks) + 1


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("max_prefixes_per_pass", [2, 100])
def test_whole_rows_give_the_same_examples(
    make: Make, sessions: list[Session], world_size: int, max_prefixes_per_pass: int
) -> None:
    settings = {"shuffle": True, "augment_prefixes": True, "max_prefixes_per_pass": max_prefixes_per_pass}
    ranks = [make(rank=rank, world_size=world_size, **settings) for rank in range(world_size)]
    assert ranks[0].num_examples == len(sessions)

    batches = list(zip(*(reader.batches(2) for reader in ranks), strict=True))

    seen = [(items, target) for raws in batches for raw in raws for _, items, target in rows_of(raw)]
    assert sorted(seen) == sorted(prefix_examples(sessions))
    for raws in batches:
        assert {raw.global_size for raw in raws} == {sum(len(rows_of(raw)) for raw in raws)}
        for raw in raws:
            assert raw.pass_offsets_P1[-1] == len(raw.targets_B)
            assert raw.pass_offsets_P1.diff().min() >= 1
            assert raw.pass_offsets_P1.diff().max() <= max_prefixes_per_pass


@pytest.mark.parametrize("max_prefixes_per_pass", [2, 100])
def test_batches_of_prefixes_in_one_pass_are_full(
    make: Make, sessions: list[Session], max_prefixes_per_pass: int
) -> None:
    settings = {
        "shuffle": True,
        "augment_prefixes": True,
        "max_prefixes_per_pass": max_prefixes_per_pass,
        "whole_rows": False,
    }
    examples = prefix_examples(sessions)
    alone = global_batches(make, 1, 2, **settings)
    order = [row for batch in alone for row in batch]

    assert sorted(order) == numbered(examples)
    assert [len(batch) for batch in alone[:-1]] == [7] * (len(examples) // 7)
    assert [len(items) for _, items, _ in order] != [len(items) for items, _ in examples], "rows are shuffled"
    for (before, _, _), (after, items, _) in pairwise(order):
        assert after == before + 1 or len(items) == 1, "prefixes of a row follow each other"
    passes = {(raw.step, row) for raw in make(**settings).batches(2) for row in starts_of_passes(raw)}
    for world_size in (2, 3, 9):
        assert global_batches(make, world_size, 2, **settings) == alone
        found = set()
        for rank in range(world_size):
            for raw in make(rank=rank, world_size=world_size, with_global_batch=True, **settings).batches(2, 3):
                found |= {(raw.step, row) for row in starts_of_passes(raw)}
                lengths, starts = raw.offsets_B1.diff(), raw.pass_offsets_P1
                assert starts[0] == 0
                assert starts[-1] == len(raw.targets_B)
                assert 1 <= starts.diff().min() <= starts.diff().max() <= max_prefixes_per_pass
                within = torch.ones(len(lengths), dtype=torch.bool).index_fill(0, starts[:-1], False)
                assert torch.equal(lengths[within], lengths[within.nonzero().squeeze(1) - 1] + 1)
                assert torch.equal(raw.rows_B[within], raw.rows_B[within.nonzero().squeeze(1) - 1] + 1)
        assert found == {(step, row) for step, row in passes if step >= 3}, "passes do not depend on the ranks"


def starts_of_passes(raw: RawSessions) -> list[int]:
    """First example of each pass, without fillers."""
    return [row for row in raw.rows_B[raw.pass_offsets_P1[:-1]].tolist() if row >= 0]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 40),
    row_group_size=st.integers(1, 12),
    batch_size=st.integers(1, 50),
    world_size=st.integers(1, 6),
    augment=st.booleans(),
    epoch=st.integers(0, 2),
)
def test_any_layout_gives_every_example_once(
    tmp_path: Path, count: int, row_group_size: int, batch_size: int, world_size: int, augment: bool, epoch: int
) -> None:
    sessions = random_sessions(count, NUM_ITEMS, seed=count)
    part = write_part(tmp_path / "part-00000.parquet", sessions, row_group_size)

    def make(**options: object) -> "SessionReader[RawSessions]":
        return reader_of([part], **options)

    batches = global_batches(
        make, world_size, epoch, batch_size=batch_size, augment_prefixes=augment, shuffle=True, seed=1
    )
    expected = prefix_examples(sessions) if augment else sessions
    assert sorted(row for batch in batches for row in batch) == numbered(expected)


def test_epochs_and_seeds_have_their_own_order(make: Make) -> None:
    def order(epoch: int, seed: int) -> list[int]:
        return [row for raw in make(shuffle=True, seed=seed).batches(epoch) for row, _, _ in rows_of(raw)]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(1, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, -1) != order(0, 1)


def test_examples_change_their_order_within_a_row_group_too(tmp_path: Path) -> None:
    part = write_part(tmp_path / "part-00000.parquet", random_sessions(30, NUM_ITEMS), row_group_size=30)
    reader = open_reader(part, shuffle=True)

    first, second = ([row for raw in reader.batches(epoch) for row, _, _ in rows_of(raw)] for epoch in (0, 1))

    assert first != second
    assert first != sorted(first)


def test_the_result_longest_unused_is_forgotten() -> None:
    made: list[str] = []
    recent: LRUCache[str, str] = LRUCache(max_size=2)

    def make(key: str) -> str:
        made.append(key)
        return key.upper()

    assert [recent.get(key, make) for key in "abacab"] == list("ABACAB")
    assert made == ["a", "b", "c", "b"]


def test_a_reader_is_freed_with_its_last_reference(make: Make) -> None:
    """Its collate function may refer to what a model has prepared for all items."""
    reader = make()
    list(reader.batches(0))
    freed = weakref.ref(reader)
    gc.disable()
    try:
        del reader
        assert freed() is None
    finally:
        gc.enable()


def test_a_rank_without_rows_gets_a_filler_of_weight_zero(make: Make) -> None:
    last = [list(make(batch_size=60, rank=rank, world_size=3).batches(0))[-1] for rank in range(3)]

    assert [raw.weights_B.tolist() for raw in last] == [[0.0], [0.0], [1.0]]
    assert [raw.rows_B.tolist() for raw in last] == [[-1], [-1], [60]]
    assert [raw.global_size for raw in last] == [1, 1, 1]
    assert last[0].offsets_B1.tolist() == [0, 1]


def test_batches_know_their_place(make: Make) -> None:
    raws = list(make(rank=1, world_size=2).batches(4, start_step=5))

    assert [(raw.epoch, raw.step, raw.global_size) for raw in raws] == [(4, 5, 7), (4, 6, 7), (4, 7, 7), (4, 8, 5)]


@pytest.mark.parametrize("passes", [0, 2])
def test_resume_continues_to_the_row_at_any_world_size(make: Make, passes: int) -> None:
    settings = {"shuffle": True, "augment_prefixes": True, "max_prefixes_per_pass": passes, "whole_rows": False}
    before = make(rank=1, world_size=2, **settings)
    stream = before.batches(2)
    for _ in range(11):
        next(stream)
    state = json.loads(json.dumps(before.state_dict()))

    for world_size in (1, 2, 3):
        after = make(world_size=world_size, **settings)
        after.load_state_dict(state)
        assert (after.epoch, after.step) == (2, 11)
        rest = global_batches(make, world_size, after.epoch, after.step, **settings)
        assert rest == global_batches(make, 1, 2, **settings)[11:]


@pytest.mark.parametrize("workers", [0, 1])
def test_position_counts_the_batches_handed_out(make: Make, workers: int) -> None:
    reader = make(workers=workers)
    assert (reader.state_dict()["epoch"], reader.state_dict()["step"]) == (0, 0)

    stream = reader.batches(1, start_step=2)
    next(stream)
    next(stream)

    assert (reader.state_dict()["epoch"], reader.state_dict()["step"]) == (1, 4)
    stream.close()  # type: ignore[attr-defined]


def test_batches_are_made_ahead_in_another_thread(make: Make) -> None:
    threads: list[str] = []
    made = Semaphore(0)

    def collate(raw: RawSessions) -> RawSessions:
        threads.append(current_thread().name)
        made.release()
        return raw

    batches = make(collate=collate).batches(0)
    next(batches)
    for _ in range(3):
        assert made.acquire(timeout=10), "further batches are made while the first one is used"
    assert all(name.startswith("reader") for name in threads)


def test_workers_do_not_change_the_batches(make: Make) -> None:
    settings = {"shuffle": True, "augment_prefixes": True, "batch_size": 16}

    alone, helped = ([rows_of(raw) for raw in make(workers=workers, **settings).batches(1)] for workers in (0, 2))

    assert alone == helped


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8}, "batch_size was 7, is 8"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"shuffle": True}, "shuffle was False, is True"),
        ({"augment_prefixes": True}, "augment_prefixes was False, is True"),
        ({"augment_prefixes": True, "max_prefixes_per_pass": 4}, "augment_prefixes was False, is True"),
        ({"max_prefixes_per_pass": 4}, "max_prefixes_per_pass was 0, is 4"),
        ({"augment_prefixes": True, "whole_rows": False}, "augment_prefixes was False, is True"),
    ],
)
def test_resume_with_another_order_is_refused(make: Make, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**change).load_state_dict(make().state_dict())


def test_a_state_of_whole_rows_is_not_one_of_cut_rows(make: Make) -> None:
    settings = {"augment_prefixes": True, "max_prefixes_per_pass": 4}
    state = make(**settings).state_dict()
    with pytest.raises(UserError, match="whole_rows was True, is False"):
        make(**settings, whole_rows=False).load_state_dict(state)
    del state["fingerprint"]["whole_rows"]
    make(**settings).load_state_dict(state)


def test_resume_with_other_files_is_refused(make: Make, tmp_path: Path) -> None:
    state = make().state_dict()
    write_part(tmp_path / "train" / "part-00001.parquet", [([1, 2], 3)])

    with pytest.raises(UserError, match="the training files have changed"):
        make().load_state_dict(state)


def test_the_folder_may_move(make: Make, tmp_path: Path, sessions: list[Session]) -> None:
    state = make().state_dict()
    parts = write_parts(tmp_path / "moved", sessions, [20, 1, 17])

    reader_of(parts, batch_size=7).load_state_dict(state)


@pytest.mark.parametrize("count", [100, 1000])
def test_memory_does_not_grow_with_the_data(tmp_path: Path, count: int) -> None:
    part = write_part(tmp_path / "part-00000.parquet", random_sessions(count, NUM_ITEMS), row_group_size=10)
    reader = reader_of([part], batch_size=25, shuffle=True)

    for raw in reader.batches(0):
        assert raw.items_L.untyped_storage().nbytes() == raw.items_L.nbytes
        assert len(reader.groups.decoded) <= 2
    assert sum(len(group) for group in (reader.groups.decoded, reader._group_orders)) <= 4


def test_each_row_group_is_decoded_once_an_epoch(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = make(shuffle=True, augment_prefixes=True, batch_size=5)
    decoded: list[int] = []
    decode = reader.groups._decode

    def counted(index: int) -> RowGroup:
        decoded.append(index)
        return decode(index)

    monkeypatch.setattr(reader.groups, "_decode", counted)

    list(reader.batches(0))

    assert sorted(decoded) == list(range(len(reader.groups)))


def open_reader(part: Path, **settings: object) -> "SessionReader[RawSessions]":
    return reader_of([part], batch_size=4, **settings)


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (([3, NUM_ITEMS], 1), f"row group 1: column items has item index {NUM_ITEMS}, .* items 0 to 10; prepare"),
        (([-2], 1), "row group 1: column items has item index -2"),
        (([1], 99), "row group 1: column target has item index 99"),
        (([1], -1), "row group 1: column target has item index -1"),
    ],
)
def test_an_index_out_of_range_is_named_at_once(tmp_path: Path, bad: Session, message: str, statistics: bool) -> None:
    sessions = [([1, 2], 3)] * 10 + [bad]
    part = write_part(tmp_path / "part-00000.parquet", sessions, write_statistics=statistics)

    with pytest.raises(UserError, match=message) as error:
        open_reader(part)
    assert str(part) in str(error.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"items": [[1], None]}, "row group 0: column items has 1 nulls"),
        ({"items": [[1], [None, 2]]}, "row group 0: column items has 1 nulls"),
        ({"target": [None, 1]}, "row group 0: column target has 1 nulls"),
        ({"target": ["a", "b"]}, "column target is string, not int64"),
        ({"items": [["a"], ["b"]]}, "column items is list<.*string>, not list<int64>"),
        ({"items": [1, 2]}, "column items is int64, not list<int64>"),
        ({"items": None}, "has no column items"),
        ({"target": None}, "has no column target"),
    ],
)
def test_a_broken_column_is_named(tmp_path: Path, columns: dict[str, list[object] | None], message: str) -> None:
    part = tmp_path / "part-00000.parquet"
    content = {"items": [[1], [2, 3]], "target": [4, 5], **columns}
    pq.write_table(pa.table({name: values for name, values in content.items() if values is not None}), part)

    with pytest.raises(UserError, match=message) as error:
        open_reader(part)
    assert str(part) in str(error.value)


def test_a_truncated_or_missing_file_is_named(tmp_path: Path) -> None:
    part = write_part(tmp_path / "part-00000.parquet", random_sessions(20, NUM_ITEMS))
    part.write_bytes(part.read_bytes()[:-30])

    with pytest.raises(UserError, match=r"part-00000\.parquet is truncated or not a Parquet file"):
        open_reader(part)
    part.unlink()
    with pytest.raises(UserError, match=r"part-00000\.parquet does not exist"):
        open_reader(part)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_pages_are_named_when_read(tmp_path: Path, workers: int) -> None:
    part = write_part(tmp_path / "part-00000.parquet", random_sessions(64, NUM_ITEMS), row_group_size=64)
    reader = open_reader(part, workers=workers)
    content = bytearray(part.read_bytes())
    content[4:600] = b"\xff" * 596
    part.write_bytes(bytes(content))

    with pytest.raises(UserError, match=r"part-00000\.parquet, row group 0: unreadable") as error:
        list(reader.batches(0))
    assert "\n" not in str(error.value)


def test_an_empty_list_is_refused_where_prefixes_are_counted(tmp_path: Path) -> None:
    part = write_part(tmp_path / "part-00000.parquet", [([1, 2], 3), ([], 4)])

    with pytest.raises(UserError, match="row group 0: column items has an empty list"):
        open_reader(part, augment_prefixes=True)
    assert [rows_of(raw) for raw in open_reader(part).batches(0)] == [[(0, [1, 2], 3), (1, [], 4)]]


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    part = write_part(tmp_path / "valid" / "part-00000.parquet", [])

    with pytest.raises(UserError, match=r"no sessions in .*valid"):
        open_reader(part)
    with pytest.raises(UserError, match="no sessions"):
        reader_of([], batch_size=1)


def test_batch_size_must_be_positive(make: Make) -> None:
    with pytest.raises(UserError, match="batch_size is 0"):
        make(batch_size=0)
