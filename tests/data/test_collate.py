import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.data.batch import RawSessions, SessionBatch
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.collate import CandidateItems, Collator, LastItemsText, LogUniformSampler, RandomNodeText
from llmgr_rec.data.jagged import Jagged, lengths_to_offsets
from llmgr_rec.data.reader import DataShard, Prefetch, SamplingOrder, SessionReader

from .files import random_sessions, write_items, write_part

NUM_ITEMS = 6
CATEGORIES = [[0, 1], [0], [], [2], [1, 2, 3], [3]]
TOKENS = [[10], [11, 11], [12, 12, 12], [], [14, 14], [15]]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return Catalog.load(write_items(tmp_path_factory.mktemp("items"), NUM_ITEMS, category_ids=CATEGORIES))


def raw_sessions(sessions: list[list[int]], targets: list[int], epoch: int = 0, step: int = 0) -> RawSessions:
    return RawSessions(
        items_L=torch.tensor([item for session in sessions for item in session], dtype=torch.int64),
        offsets_B1=lengths_to_offsets(torch.tensor([len(session) for session in sessions])),
        targets_B=torch.tensor(targets),
        weights_B=torch.ones(len(sessions)),
        rows_B=torch.arange(len(sessions)),
        global_size=len(sessions),
        step=step,
        epoch=epoch,
    )


def jagged(rows: list[list[int]]) -> Jagged:
    values = torch.tensor([value for row in rows for value in row], dtype=torch.int64)
    return Jagged.from_lengths(values, torch.tensor([len(row) for row in rows]))


def as_lists(rows: Jagged) -> list[list[int]]:
    return [part.tolist() for part in torch.split(rows.values, rows.lengths.tolist())]


def bags(features: KeyedJaggedTensor, key: str) -> list[list[int]]:
    bag = features[key]
    return [part.tolist() for part in torch.split(bag.values(), bag.lengths().tolist())]


RAW = raw_sessions([[4, 1, 4], [], [2]], [0, 3, -1])


def test_features_have_a_bag_for_each_node_then_each_candidate(catalog: Catalog) -> None:
    batch = Collator(catalog, ["category", "brand"], candidates=CandidateItems("full"))(RAW)

    order = [4, 1, 2, *range(NUM_ITEMS)]
    assert batch.features.keys() == ["item_id", "category", "brand"]
    assert batch.features.stride() == len(order) == batch.graph.node_items_N.numel() + batch.candidates_C.numel()
    assert bags(batch.features, "item_id") == [[item] for item in order]
    assert bags(batch.features, "category") == [CATEGORIES[item] for item in order]
    assert bags(batch.features, "brand") == [[]] * len(order)


def test_whole_catalog_needs_no_correction(catalog: Catalog) -> None:
    batch = Collator(catalog, candidates=CandidateItems("full"))(RAW)

    assert batch.candidates_C.tolist() == list(range(NUM_ITEMS))
    assert batch.log_q_C.numel() == 0
    assert batch.target_columns_B.tolist() == batch.targets_B.tolist() == [0, 3, -1]


def test_without_candidates_and_text_their_places_are_empty(catalog: Catalog) -> None:
    batch = Collator(catalog)(RAW)

    assert batch.features.keys() == ["item_id"]
    assert (batch.candidates_C.numel(), batch.log_q_C.numel()) == (0, 0)
    assert batch.target_columns_B.tolist() == [0, 3, -1]
    assert batch.text_items_B.tolist() == [-1, -1, -1]
    assert as_lists(batch.text_tokens) == [[], [], []]


def test_a_batch_of_empty_sessions_is_a_batch(catalog: Catalog) -> None:
    tokens = jagged(TOKENS)
    for text in (None, RandomNodeText(tokens), LastItemsText(tokens, 2)):
        collate = Collator(catalog, ["category"], text=text)
        batch = collate(raw_sessions([[], []], [1, -1]))
        assert batch.features.stride() == 0
        assert as_lists(batch.text_tokens) == [[], []]
        assert batch.to(torch.device("cpu")).num_sessions == 2


def test_sampled_candidates_hold_the_targets_and_find_their_columns(catalog: Catalog) -> None:
    batch = Collator(catalog, ["category"], candidates=CandidateItems("sampled", 2))(RAW)

    candidates = batch.candidates_C.tolist()
    assert candidates == sorted(set(candidates))
    assert batch.candidates_C[batch.target_columns_B[:2]].tolist() == [0, 3]
    assert batch.target_columns_B[2] == -1
    assert batch.log_q_C.dtype == torch.float32
    assert bool((batch.log_q_C <= 0).all())
    assert bags(batch.features, "category")[3:] == [CATEGORIES[item] for item in candidates]


def test_draws_depend_on_seed_epoch_and_step_not_on_the_rank(catalog: Catalog) -> None:
    counts = torch.arange(1000, 0, -1)

    def draws(targets: list[int], epoch: int, step: int, seed: int = 0) -> set[int]:
        sampler = LogUniformSampler(counts, 50, seed)
        return set(sampler.sample(torch.tensor(targets, dtype=torch.int64), epoch, step)[0].tolist())

    assert draws([], 1, 2) | {7, 999} == draws([7, 999], 1, 2)
    assert len({frozenset(draws([], *place)) for place in [(0, 0), (0, 1), (1, 0), (0, 0, 1)]}) == 4


@pytest.mark.parametrize("mode", ["rows", "prefixes", "one_pass", "whole_rows", "random_node"])
def test_all_ranks_have_the_sample_of_one(catalog: Catalog, tmp_path: Path, mode: str) -> None:
    part = write_part(tmp_path / "part-00000.parquet", random_sessions(23, NUM_ITEMS))
    collate = Collator(
        catalog,
        candidates=CandidateItems("sampled", 2),
        text=RandomNodeText(jagged([[item] for item in range(NUM_ITEMS)])) if mode == "random_node" else None,
    )

    def samples(rank: int, world_size: int) -> list[tuple[list[int], list[float]]]:
        reader = SessionReader(
            [part],
            num_items=NUM_ITEMS,
            collate=collate,
            order=SamplingOrder(
                5,
                shuffle=True,
                augment_prefixes=mode in ("prefixes", "one_pass", "whole_rows"),
                max_prefixes_per_pass=3 if mode in ("one_pass", "whole_rows") else 0,
                whole_rows=mode == "whole_rows",
            ),
            shard=DataShard(rank, world_size, with_global_batch=True),
        )
        found = []
        for batch in reader.batches(0):
            real_B = batch.weights_B > 0
            assert torch.equal(batch.candidates_C[batch.target_columns_B[real_B]], batch.targets_B[real_B])
            found.append((batch.candidates_C.tolist(), batch.log_q_C.tolist()))
        return found

    alone = samples(0, 1)
    assert len({len(candidates) for candidates, _ in alone}) > 1, "nothing to tell batches apart"
    for rank in range(3):
        assert samples(rank, 3) == alone


def test_log_q_is_the_log_of_the_measured_frequency() -> None:
    counts = torch.tensor([1, 50, 3, 0, 20, 9, 9, 2])
    sampler = LogUniformSampler(counts, num_draws=3, seed=0)
    frequency = counts.numpy() / counts.sum().item()
    rng = np.random.default_rng(1)
    seen: Counter[int] = Counter()
    log_q: dict[int, float] = {}
    steps = 4000
    for step in range(steps):
        targets = torch.from_numpy(rng.choice(len(counts), size=2, p=frequency))
        items, logs = sampler.sample(targets, 0, step)
        seen.update(items.tolist())
        log_q.update(zip(items.tolist(), logs.tolist(), strict=True))

    assert len(log_q) == len(counts)
    for item, log in log_q.items():
        assert seen[item] / steps == pytest.approx(math.exp(log), abs=0.04)


def test_random_node_shows_the_text_of_an_item_of_the_session_and_asks_for_it(catalog: Catalog) -> None:
    collate = Collator(catalog, text=RandomNodeText(jagged(TOKENS)))
    sessions = [[4, 1, 4, 5], [], [2], [3, 3]] * 20
    batch = collate(raw_sessions(sessions, [0] * len(sessions)))

    shown = batch.text_items_B.tolist()
    assert all(item in session if session else item == -1 for item, session in zip(shown, sessions, strict=True))
    assert as_lists(batch.text_tokens) == [TOKENS[item] if item >= 0 else [] for item in shown]
    assert batch.targets_B.tolist() == batch.target_columns_B.tolist() == shown
    assert set(shown[::4]) == {4, 1, 5}


def test_random_node_depends_on_the_row_not_on_its_neighbors(catalog: Catalog) -> None:
    session = [0, 1, 2, 3, 4, 5]

    def node(seed: int, epoch: int, row: int, others: int) -> int:
        raw = raw_sessions([session] * (others + 1), [0] * (others + 1), epoch=epoch)
        raw.rows_B = torch.arange(row - others, row + 1)
        collate = Collator(catalog, text=RandomNodeText(jagged(TOKENS)), seed=seed)
        return int(collate(raw).text_items_B[-1])

    assert node(0, 0, 9, others=0) == node(0, 0, 9, others=5)
    assert len({node(0, epoch, 9, 0) for epoch in range(20)}) > 3
    assert len({node(seed, 0, 9, 0) for seed in range(20)}) > 3
    counts = Counter(node(0, 0, row, 0) for row in range(600))
    assert max(counts.values()) < 150
    assert len(counts) == NUM_ITEMS


def test_random_node_is_among_the_clicks_that_the_prompt_shows(catalog: Catalog) -> None:
    collate = Collator(catalog, text=RandomNodeText(jagged(TOKENS), max_nodes=2))
    batch = collate(raw_sessions([[0, 1, 2, 3]] * 50, [0] * 50))

    assert set(batch.text_items_B.tolist()) == {2, 3}


@pytest.mark.parametrize("separator", [[], [7, 8]])
def test_last_items_shows_the_texts_of_the_last_clicks(catalog: Catalog, separator: list[int]) -> None:
    sessions = [[0, 1, 2], [], [5], [3, 4], [1, 3, 1]]
    collate = Collator(catalog, text=LastItemsText(jagged(TOKENS), 2, separator))
    batch = collate(raw_sessions(sessions, [0] * 5))

    def expected(session: list[int]) -> list[int]:
        texts = [TOKENS[item] for item in session[-2:]]
        return [token for place, text in enumerate(texts) for token in [*(separator if place else []), *text]]

    assert as_lists(batch.text_tokens) == [expected(session) for session in sessions]
    assert batch.text_items_B.tolist() == [-1] * 5
    assert batch.targets_B.tolist() == [0] * 5


def test_no_session_sees_its_future(catalog: Catalog, tmp_path: Path) -> None:
    """Every prefix example holds the clicks before its target and nothing later."""
    part = write_part(tmp_path / "part-00000.parquet", [([0, 1, 2, 3], 4)])
    collate = Collator(catalog, text=LastItemsText(jagged([[i] for i in range(6)]), 9))
    reader = SessionReader([part], num_items=NUM_ITEMS, collate=collate, order=SamplingOrder(1, augment_prefixes=True))

    for target, batch in enumerate(reader.batches(0), start=1):
        assert batch.targets_B.tolist() == [target]
        assert batch.graph.node_items_N.tolist() == batch.text_tokens.values.tolist() == list(range(target))


def test_batches_come_whole_through_worker_processes(catalog: Catalog, tmp_path: Path) -> None:
    part = write_part(tmp_path / "part-00000.parquet", random_sessions(40, NUM_ITEMS))
    collate = Collator(catalog, ["category"], candidates=CandidateItems("sampled", 3))

    def read(workers: int) -> list[SessionBatch]:
        reader = SessionReader(
            [part],
            num_items=NUM_ITEMS,
            collate=collate,
            order=SamplingOrder(9, shuffle=True),
            prefetch=Prefetch(workers),
        )
        return list(reader.batches(0))

    for alone, helped in zip(read(0), read(2), strict=True):
        assert torch.equal(alone.features.values(), helped.features.values())
        assert torch.equal(alone.features.lengths(), helped.features.lengths())
        for one, other in zip(alone.graph.tensors(), helped.graph.tensors(), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(alone.log_q_C, helped.log_q_C)
        assert torch.equal(alone.rows_B, helped.rows_B)
