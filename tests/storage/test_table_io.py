"""Initial tables depend on seed, table, row and column only."""

import pytest
import torch
from torch import Tensor, nn

from llmgr_rec.config import TablesConfig
from llmgr_rec.distributed.process_group import World
from llmgr_rec.storage.table_io import fill_table, init_tables, local_shards, table_parameters
from tests.distributed.small_model import (
    NUM_ITEMS,
    TEXT_DIM,
    SmallModel,
    assemble,
    collection,
    shard_list,
    sharded_model,
)
from tests.ranks import run_on_ranks

TEXT = "text_tables.embedding_bags.item_text.weight"


def init_rank(world: World) -> list[list[tuple[str, int, int, Tensor]]]:
    answers = []
    for sharding in ("table_wise", "column_wise"):
        model = sharded_model(world, TablesConfig(sharding=sharding))
        answers.append(shard_list(model))
        fill_table(model, TEXT, lambda rows, cols: numbered(rows, cols))
        answers.append(shard_list(model))
    return answers


def numbered(rows: range, cols: range) -> Tensor:
    return torch.tensor(rows)[:, None] * 100.0 + torch.tensor(cols)[None, :]


@pytest.mark.dist
def test_every_sharding_makes_the_same_tables_and_fills_its_own_part() -> None:
    plain = SmallModel()
    init_tables(plain, 3, 0.1)
    expected = assemble([shard_list(plain)])
    answers = run_on_ranks(init_rank, 2)
    for case in range(4):
        whole = assemble([rank[case] for rank in answers])
        if case % 2:
            assert torch.equal(whole[TEXT], numbered(range(NUM_ITEMS), range(TEXT_DIM)))
            continue
        assert whole.keys() == expected.keys() == table_parameters(plain).keys()
        for name, value in expected.items():
            assert torch.equal(whole[name], value), name
            assert len(value.unique(dim=0)) == len(value), f"{name} has equal rows"
            assert len(value.unique(dim=1).T) == value.shape[1], f"{name} has equal columns"


def test_initial_values_follow_seed_and_std() -> None:
    tables = {seed: SmallModel() for seed in (0, 1)}
    for seed, model in tables.items():
        init_tables(model, seed, 0.1)
    first, second = (next(local_shards(model)).tensor for model in tables.values())
    assert not torch.equal(first, second)
    large = collection({"item_id": 20_000}, 12, {"item_id": "item_id"}, "cpu")
    init_tables(large, 0, 0.5)
    values = next(local_shards(large)).tensor
    assert values.std().item() == pytest.approx(0.5, rel=0.02)
    assert values.mean().item() == pytest.approx(0.0, abs=0.01)
    assert len(values.unique(dim=0)) == 20_000
    # A catalog that grows keeps the values of its old rows.
    small = collection({"item_id": 9_000}, 12, {"item_id": "item_id"}, "cpu")
    init_tables(small, 0, 0.5)
    assert torch.equal(next(local_shards(small)).tensor, values[:9_000])


def test_a_table_that_is_not_there_cannot_be_filled() -> None:
    model = SmallModel()
    with pytest.raises(KeyError, match="no embedding table nowhere"):
        fill_table(model, "nowhere", numbered)
    assert isinstance(model, nn.Module)
