"""Ranking across ranks equals ranking in one process."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.baselines.blend import Blend
from llmgr_rec.config import TablesConfig
from llmgr_rec.data.domains import ItemDomains
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed import item_vectors, ranking
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.ranking import CatalogRanker
from llmgr_rec.distributed.sharding import shard
from llmgr_rec.errors import UserError
from llmgr_rec.kernels import batch_scan, topk
from llmgr_rec.kernels.topk import top_k
from llmgr_rec.storage.table_io import init_tables, local_shards
from tests.distributed.small_model import collection
from tests.ranks import run_on_ranks

DIM, K = 8, 7


class Items(nn.Module):
    """A model of item vectors only."""

    def __init__(self, num_items: int, device: str = "cpu") -> None:
        super().__init__()
        self.tables = collection({"item_id": num_items}, DIM, {"item_id": "item_id"}, device)

    def item_vectors(self, features: KeyedJaggedTensor) -> Tensor:
        # Rounded, so that products are exact and ties are frequent.
        return (self.tables(features).values() * 20).round()


class Bags:
    def __init__(self, num_items: int) -> None:
        self.num_items = num_items

    def item_features(self, items_X: Tensor) -> KeyedJaggedTensor:
        return KeyedJaggedTensor(keys=["item_id"], values=items_X, lengths=torch.ones_like(items_X))


def queries_of(rank: int, count: int) -> Tensor:
    return torch.randint(-2, 3, (count, DIM), generator=torch.Generator().manual_seed(rank)).float()


def winners(ids_BK: Tensor, count: int) -> Jagged:
    """The first items of each list, and as many for the last session as a list can hold."""
    rows = [row[row >= 0].tolist() for row in ids_BK]
    kept = [row[:count] for row in rows[:-1]] + rows[-1:]
    values = torch.tensor([item for row in kept for item in row], dtype=torch.int64)
    return Jagged.from_lengths(values, torch.tensor([len(row) for row in kept], dtype=torch.int64))


def clicks_of(rank: int, count: int, num_items: int) -> Jagged:
    """Sessions of up to four clicks, some empty and some with an item twice."""
    draw = torch.Generator().manual_seed(100 + rank)
    lengths = torch.randint(0, 5, (count,), generator=draw)
    return Jagged.from_lengths(torch.randint(num_items, (int(lengths.sum()),), generator=draw), lengths)


def blend_of(num_items: int) -> Blend:
    """Few-bit numbers, so that sums are exact and ties are frequent."""
    draw = np.random.default_rng(num_items)
    size = min(num_items * 20, num_items**2)
    pairs = draw.integers(num_items, size=(2, size))
    similarity = sparse.csr_array((draw.integers(1, 9, size).astype(np.float32), tuple(pairs)), (num_items, num_items))
    return Blend({"item_knn": 1.0}, similarity, 0.5)


def dense_blend(clicks: Jagged, num_items: int, decay: float = 0.5) -> Tensor:
    similarity = torch.from_numpy(blend_of(num_items).similarity_VR.toarray())
    added = torch.zeros(clicks.num_rows, num_items)
    for row in range(clicks.num_rows):
        for after, item in enumerate(reversed(clicks.narrow(row, row + 1).values.tolist())):
            added[row] += decay**after * similarity[item]
    return added


def domains_of(num_items: int) -> ItemDomains:
    """Two domains, whose items do not follow each other."""
    return ItemDomains(("a", "b"), (torch.arange(num_items) % 3 == 0).to(torch.int16))


def within_domains(scores: Tensor, clicks: Jagged) -> Tensor:
    """The scores of the items of the domain of each newest click; -inf for the others."""
    domains = domains_of(scores.shape[1])
    return scores.masked_fill(domains.of_item_V != domains.of_sessions(clicks).unsqueeze(1), -torch.inf)


def plain_items(num_items: int) -> Tensor:
    model = Items(num_items)
    init_tables(model, 1, 0.1)
    return model.item_vectors(Bags(num_items).item_features(torch.arange(num_items))).detach()


def plain_ranker(num_items: int, blend: Blend | None = None, domains: ItemDomains | None = None) -> CatalogRanker:
    model = Items(num_items)
    init_tables(model, 1, 0.1)
    return CatalogRanker(model, Bags(num_items), World.alone(), blend, domains)


def sorted_scores(scores: Tensor, exclude: Jagged | None) -> tuple[Tensor, Tensor]:
    """The first K items of a stable sort of all scores."""
    if exclude is not None:
        scores[exclude.row_of_value, exclude.values] = -torch.inf
    values, ids = scores.sort(dim=1, descending=True, stable=True)
    room = max(K - scores.shape[1], 0)
    ids = nn.functional.pad(ids[:, :K], (0, room), value=-1)
    values = nn.functional.pad(values[:, :K], (0, room), value=-torch.inf)
    return torch.where(values.isneginf(), -1, ids), values


def rank_with_blend(world: World, sizes: list[int], catalogs: list[int]) -> list[tuple[Tensor, ...]]:
    # Many blocks of queries and of items.
    topk._QUERY_BLOCK, topk._CPU_FIRST_BLOCK, topk._CPU_ITEM_BLOCK = 4, 128, 128
    # The largest catalog is ranked by bounds.
    batch_scan._LEAST_ITEMS, batch_scan._ITEM_BLOCK, batch_scan._QUERY_BLOCK = 1000, 512, 8
    batch_scan.has_fast_products = lambda num_columns: True  # type: ignore[assignment]
    item_vectors.BLOCK_ITEMS, item_vectors._CHUNK = 700, 200
    answers: list[tuple[Tensor, ...]] = []
    for num_items in catalogs:
        model = Items(num_items, "meta")
        shard(model, TablesConfig(dim=DIM), world, lambda name: True)
        init_tables(model, 1, 0.1)
        ranker = CatalogRanker(model, Bags(num_items), world, blend_of(num_items))
        assert (ranker._batch_scan is not None) == (num_items > 3000)
        queries = queries_of(world.rank, sizes[world.rank])
        clicks = clicks_of(world.rank, sizes[world.rank], num_items)
        within = CatalogRanker(model, Bags(num_items), world, blend_of(num_items), domains_of(num_items))
        found = (
            *ranker.rank(queries, K, None, clicks),
            *ranker.rank(queries, K, clicks, clicks),
            *within.rank(queries, K, clicks, clicks),
        )
        bags, blend, domains = Bags(num_items), blend_of(num_items), domains_of(num_items)
        in_blocks = CatalogRanker(model, bags, world, blend, keep=False)
        within_in_blocks = CatalogRanker(model, bags, world, blend, domains, keep=False)
        # Twice, as the vectors of a domain are not kept for the next batch.
        for _ in range(2):
            again = (
                *in_blocks.rank(queries, K, None, clicks),
                *in_blocks.rank(queries, K, clicks, clicks),
                *within_in_blocks.rank(queries, K, clicks, clicks),
            )
            assert all(map(torch.equal, found, again))
        answers.append(found)
    return answers


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_blend_is_added_to_the_scores_before_ranking(ranks: int) -> None:
    sizes, catalogs = [11, 3][:ranks], [3001, 951, 101, 3, 1]
    answers = run_on_ranks(rank_with_blend, ranks, sizes, catalogs)
    for number, num_items in enumerate(catalogs):
        items = plain_items(num_items)
        for rank, size in enumerate(sizes):
            clicks = clicks_of(rank, size, num_items)
            alone = queries_of(rank, size) @ items.T
            total = alone + dense_blend(clicks, num_items)
            within = within_domains(total, clicks)
            for place, (blended, exclude) in enumerate([(total, None), (total, clicks), (within, clicks)]):
                found = answers[rank][number][2 * place : 2 * place + 2]
                ids, scores = sorted_scores(blended.clone(), exclude)
                assert torch.equal(found[0], ids)
                assert torch.equal(found[1], scores)
            if num_items > 3:
                assert not torch.equal(found[0], sorted_scores(alone, clicks)[0]), "the blend changes nothing"


@pytest.mark.parametrize(("share", "domains"), [(None, False), (0.9, False), (0.05, False), (None, True), (0.9, True)])
def test_few_sessions_are_ranked_as_many_are(share: float | None, domains: bool) -> None:
    num_items, size = 3001, 11
    ranker = plain_ranker(num_items, blend_of(num_items), domains_of(num_items) if domains else None)
    ranker.prepare_for_few_sessions()
    clicks, queries = clicks_of(0, size, num_items), queries_of(0, size)
    queries[3] = 0
    scores = queries @ plain_items(num_items).T + dense_blend(clicks, num_items)
    if domains:
        scores = within_domains(scores, clicks)
    if share is not None:
        is_chosen = torch.rand(num_items, generator=torch.Generator().manual_seed(1)) < share
        scores[:, ~is_chosen] = -torch.inf
        ranker = ranker.among(is_chosen.nonzero().squeeze(1))
    for exclude in (None, clicks):
        ids, values = sorted_scores(scores.clone(), exclude)
        for row in range(size):
            one = slice(row, row + 1)
            excluded = None if exclude is None else exclude.narrow(row, row + 1)
            found = ranker.rank(queries[one], K, excluded, clicks.narrow(row, row + 1))
            assert torch.equal(found[0], ids[one])
            assert torch.equal(found[1], values[one])
        found = ranker.rank(queries, K, exclude, clicks)
        assert torch.equal(found[0], ids)
        assert torch.equal(found[1], values)


WEIGHTS = [(0.0, 0.0), (1.0, 0.0), (0.5, 2.0)]


def targets_of(rank: int, count: int, num_items: int) -> Tensor:
    return torch.randint(num_items, (count,), generator=torch.Generator().manual_seed(200 + rank))


def target_ranks(world: World, sizes: list[int], num_items: int) -> list[Tensor]:
    # Blocks of three sessions.
    ranking._MAX_SCORES = 3 * -(-num_items // world.size)
    model = Items(num_items, "meta")
    shard(model, TablesConfig(dim=DIM), world, lambda name: True)
    init_tables(model, 1, 0.1)
    ranker = CatalogRanker(model, Bags(num_items), world)
    size = sizes[world.rank]
    clicks = clicks_of(world.rank, size, num_items)
    blend = blend_of(num_items).of_items(ranker.items)
    added = [ranker.added_by(blend, clicks), ranker.added_by(replace(blend, decay=0.25), clicks)]
    arguments = (queries_of(world.rank, size), targets_of(world.rank, size, num_items), added, WEIGHTS)
    within = CatalogRanker(model, Bags(num_items), world, domains=domains_of(num_items))
    found = [
        ranker.target_ranks(*arguments),
        ranker.target_ranks(*arguments, clicks),
        within.target_ranks(*arguments, clicks),
    ]
    item_vectors.BLOCK_ITEMS, ranking._MAX_SCORES = 20, 3 * 20
    in_blocks = CatalogRanker(model, Bags(num_items), world, keep=False)
    within = CatalogRanker(model, Bags(num_items), world, domains=domains_of(num_items), keep=False)
    again = [
        in_blocks.target_ranks(*arguments),
        in_blocks.target_ranks(*arguments, clicks),
        within.target_ranks(*arguments, clicks),
    ]
    assert all(map(torch.equal, found, again))
    with pytest.raises(ValueError, match="not kept"):
        _ = in_blocks.item_vectors
    if world.rank == world.size - 1:
        ranker.item_vectors[-1] = torch.nan
        for shard_of_rank in local_shards(model):
            shard_of_rank.tensor[-1] = torch.nan
    for broken in (ranker, in_blocks):
        with pytest.raises(UserError, match="not numbers"):
            broken.target_ranks(*arguments)
    return found


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_target_ranks_are_those_of_the_whole_catalog_at_any_number_of_ranks(ranks: int) -> None:
    sizes, num_items = [11, 4][:ranks], 101
    answers = run_on_ranks(target_ranks, ranks, sizes, num_items)
    for rank, size in enumerate(sizes):
        clicks, targets = clicks_of(rank, size, num_items), targets_of(rank, size, num_items)
        targets_B1 = targets.unsqueeze(1)
        alone = queries_of(rank, size) @ plain_items(num_items).T
        of_target = Jagged.from_lengths(targets, torch.ones_like(targets))
        cases = zip(
            answers[rank], (None, clicks, clicks), (alone, alone, within_domains(alone, of_target)), strict=True
        )
        for found, exclude, scores in cases:
            for found_ranks, weights in zip(found, WEIGHTS, strict=True):
                total = scores + sum(
                    w * dense_blend(clicks, num_items, d) for w, d in zip(weights, (0.5, 0.25), strict=True)
                )
                if exclude is not None:
                    total[exclude.row_of_value, exclude.values] = -torch.inf
                order = total.argsort(dim=1, descending=True, stable=True)
                expected = (order == targets_B1).float().argmax(1)
                excluded = total.gather(1, targets_B1).squeeze(1).isneginf()
                assert torch.equal(found_ranks, torch.where(excluded, ranking.EXCLUDED_RANK, expected))
            assert len(found.unique(dim=0)) == len(WEIGHTS)


def test_a_ranker_with_a_blend_needs_clicks() -> None:
    with pytest.raises(ValueError, match="needs the clicks"):
        plain_ranker(101, blend_of(101)).rank(queries_of(0, 4), K)


def rank_on_ranks(world: World, sizes: list[int], catalogs: list[int]) -> list[tuple[Tensor, ...]]:
    answers: list[tuple[Tensor, ...]] = []
    for num_items in catalogs:
        model = Items(num_items, "meta")
        shard(model, TablesConfig(dim=DIM), world, lambda name: True)
        init_tables(model, 1, 0.1)
        ranker = CatalogRanker(model, Bags(num_items), world)
        queries = queries_of(world.rank, sizes[world.rank])
        plain = ranker.rank(queries, K)
        limited = ranker.rank(queries, K, winners(plain[0], 2))
        answers.append((*plain, *limited))
        # A single rank's broken query must not leave the others waiting.
        if world.rank == 0:
            queries[0, 0] = torch.nan
        for broken in (ranker, CatalogRanker(model, Bags(num_items), world, keep=False)):
            with pytest.raises(UserError, match="not numbers"):
                broken.rank(queries, K)
    return answers


@pytest.mark.dist
def test_two_ranks_with_uneven_batches_equal_one() -> None:
    sizes, catalogs = [5, 2], [9001, 101, 3, 1]
    answers = run_on_ranks(rank_on_ranks, 2, sizes, catalogs)
    for number, num_items in enumerate(catalogs):
        ranker = plain_ranker(num_items)
        for rank, size in enumerate(sizes):
            ids, scores, limited_ids, limited_scores = answers[rank][number]
            expected = ranker.rank(queries_of(rank, size), K)
            assert torch.equal(ids, expected[0])
            assert torch.equal(scores, expected[1])
            limited = ranker.rank(queries_of(rank, size), K, winners(ids, 2))
            assert torch.equal(limited_ids, limited[0])
            assert torch.equal(limited_scores, limited[1])
            assert torch.equal(limited_ids[:-1, : K - 2], ids[:-1, 2:]), "exclusion is more than leaving items out"


def test_one_rank_ranks_all_items() -> None:
    ranker = plain_ranker(101)
    model = Items(101)
    init_tables(model, 1, 0.1)
    items = model.item_vectors(Bags(101).item_features(torch.arange(101)))
    ids, scores = ranker.rank(queries_of(0, 4), K)
    expected_ids, expected_scores = top_k(queries_of(0, 4), items, K)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(scores, expected_scores)
    with pytest.raises(ValueError, match="must be 1 or more"):
        ranker.rank(queries_of(0, 4), 0)
