"""Ranking over ranks equals ranking in one place."""

import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.config import TablesConfig
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.ranking import CatalogueRanker
from llmgr_rec.distributed.sharding import shard
from llmgr_rec.distributed.shards import init_tables
from llmgr_rec.distributed.topk import top_k
from llmgr_rec.errors import UserError
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


def winners(ids_BK: Tensor, places: int) -> Jagged:
    """The first items of each list, and as many for the last session as a list can hold."""
    rows = [row[row >= 0].tolist() for row in ids_BK]
    kept = [row[:places] for row in rows[:-1]] + rows[-1:]
    values = torch.tensor([item for row in kept for item in row], dtype=torch.int64)
    return Jagged.from_lengths(values, torch.tensor([len(row) for row in kept], dtype=torch.int64))


def plain_ranker(num_items: int) -> CatalogueRanker:
    model = Items(num_items)
    init_tables(model, 1, 0.1)
    return CatalogueRanker(model, Bags(num_items), World(0, 1, 0, 1, torch.device("cpu")))


def rank_on_ranks(world: World, sizes: list[int], catalogues: list[int]) -> list[tuple[Tensor, ...]]:
    answers: list[tuple[Tensor, ...]] = []
    for num_items in catalogues:
        model = Items(num_items, "meta")
        shard(model, TablesConfig(dim=DIM), world, lambda name: True)
        init_tables(model, 1, 0.1)
        ranker = CatalogueRanker(model, Bags(num_items), world)
        queries = queries_of(world.rank, sizes[world.rank])
        plain = ranker.rank(queries, K)
        limited = ranker.rank(queries, K, winners(plain[0], 2))
        answers.append((*plain, *limited))
        # A single rank's broken query must not leave the others waiting.
        if world.rank == 0:
            queries[0, 0] = torch.nan
        with pytest.raises(UserError, match="not numbers"):
            ranker.rank(queries, K)
    return answers


@pytest.mark.dist
def test_two_ranks_with_uneven_batches_equal_one() -> None:
    sizes, catalogues = [5, 2], [9001, 101, 3, 1]
    answers = run_on_ranks(rank_on_ranks, 2, sizes, catalogues)
    for number, num_items in enumerate(catalogues):
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
    with pytest.raises(ValueError, match="at least 1"):
        ranker.rank(queries_of(0, 4), 0)
