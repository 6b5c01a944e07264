"""Sharding: one rank equals two, tables are really sharded, frozen is frozen, what does not fit is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

from llmgr_rec.config import TablesConfig
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.sharding import column_width, plan_tables
from llmgr_rec.errors import UserError
from llmgr_rec.storage.table_io import init_tables
from tests.distributed.small_model import (
    SmallModel,
    assemble,
    batch,
    is_trained,
    shard_list,
    sharded_model,
)
from tests.ranks import run_on_ranks

STEPS = 4
Shards = list[tuple[str, int, int, Tensor]]


def train_rank(world: World, tables: TablesConfig) -> tuple[list[float], Shards, Shards, Tensor]:
    """Trains some steps; returns losses, the tables before and after, and the dense weight."""
    from torchrec.optim.optimizers import in_backward_optimizer_filter

    model = sharded_model(world, tables)
    before = shard_list(model)
    rest = {n: p for n, p in in_backward_optimizer_filter(model.named_parameters()) if p.requires_grad}
    dense = [p for n, p in rest.items() if "item_tables" not in n]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(dense, lr=0.1)]
    if table_parameters := [p for n, p in rest.items() if "item_tables" in n]:
        optimizers.append(torch.optim.Adam(table_parameters, lr=tables.lr))
    losses = []
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model.fused_optimizer.zero_grad()
        loss = model(batch(step, world))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses, before, shard_list(model), model.state_dict()["encoder.weight"].detach().clone()


def train_all(world: World, cases: list[TablesConfig]) -> list[tuple[list[float], Shards, Shards, Tensor]]:
    return [train_rank(world, tables) for tables in cases]


def train_plain(tables: TablesConfig) -> tuple[list[float], SmallModel]:
    """The readable reference: the unsharded model with torch's own optimizers."""
    model = SmallModel()
    init_tables(model, 3, 0.1)
    kinds = {
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=tables.lr, eps=1e-8),
        "sgd": lambda p: torch.optim.SGD(p, lr=tables.lr),
        "adam": lambda p: torch.optim.Adam(p, lr=tables.lr),
    }
    optimizers = [
        torch.optim.SGD(model.encoder.parameters(), lr=0.1),
        kinds[tables.optimizer](model.item_tables.parameters()),
    ]
    losses = []
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model(batch(step, World.alone()))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses, model


CASES = [
    TablesConfig(optimizer=optimizer, sharding=sharding, lr=0.05)
    for optimizer in ("adagrad", "sgd", "adam")
    for sharding in ("table_wise", "column_wise", "auto")
] + [
    TablesConfig(optimizer="rowwise_adagrad", sharding="table_wise"),
    TablesConfig(dtype="float16", sharding="column_wise", lr=0.05),
]


@pytest.mark.dist
@pytest.mark.parametrize("size", [1, 2])
def test_sharded_training_equals_plain_training(size: int) -> None:
    per_rank = run_on_ranks(train_all, size, CASES)
    for number, tables in enumerate(CASES):
        results = [rank[number] for rank in per_rank]
        losses = [sum(values) / size for values in zip(*(result[0] for result in results), strict=True)]
        before, after = assemble([r[1] for r in results]), assemble([r[2] for r in results])
        text = "text_tables.embedding_bags.item_text.weight"
        assert torch.equal(before[text], after[text]), "a frozen table moved"
        for name in before:
            if is_trained(name):
                assert (before[name] - after[name]).abs().max() > 1e-3, f"{name} did not train"
        if size == 2 and tables.sharding == "column_wise":
            assert all(len(result[2]) == 3 for result in results), "a table is not sharded across both ranks"
        if size == 2 and tables.sharding == "table_wise":
            assert all(result[2] for result in results), "a rank holds nothing"
        if tables.optimizer == "rowwise_adagrad":
            continue
        plain_losses, plain = train_plain(tables)
        # A number of float16 has 11 bits, and each step rounds.
        tolerance = 1e-5 if tables.dtype == "float32" else 5e-4
        assert losses == pytest.approx(plain_losses, abs=tolerance), tables
        for name, value in plain.state_dict().items():
            if "embedding_bags" in name:
                assert after[name].dtype == getattr(torch, tables.dtype)
                torch.testing.assert_close(after[name].float(), value, atol=tolerance, rtol=0, msg=f"{tables} {name}")
        torch.testing.assert_close(results[0][3], plain.encoder.weight.detach(), atol=tolerance, rtol=0)


def test_adam_on_a_cpu_has_no_state_in_float16() -> None:
    tables = TablesConfig(optimizer="adam", dtype="float16")
    with pytest.raises(UserError, match=r"tables.dtype is float16.*adagrad or rowwise_adagrad"):
        plan_tables(SmallModel("meta"), tables, 2, 2, "cpu", is_trained)
    assert plan_tables(SmallModel("meta"), tables, 2, 2, "cuda", is_trained).plan


def test_a_table_that_does_not_fit_names_table_and_remedy() -> None:
    tables = TablesConfig(sharding="table_wise", memory_per_rank_gb=1e-6)
    with pytest.raises(UserError, match=r"table item_id with 103 rows.*--tables.memory_per_rank_gb"):
        plan_tables(SmallModel("meta"), tables, 2, 2, "cpu", is_trained)


def test_a_width_that_is_no_multiple_of_four_is_refused() -> None:
    module = nn.Module()
    module.item_tables = collection_of_width(30)
    with pytest.raises(UserError, match=r"table item_id has 30 columns.*--tables.dim"):
        plan_tables(module, TablesConfig(), 2, 2, "cpu", is_trained)


def managed() -> nn.Module:
    from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
    from torchrec.modules.mc_modules import (
        DistanceLFU_EvictionPolicy,
        ManagedCollisionCollection,
        MCHManagedCollisionModule,
    )

    tables = collection_of_width(8)
    module = MCHManagedCollisionModule(
        10, torch.device("meta"), DistanceLFU_EvictionPolicy(), eviction_interval=1, input_hash_size=100
    )
    configs = tables.embedding_bag_configs()
    return ManagedCollisionEmbeddingBagCollection(tables, ManagedCollisionCollection({"item_id": module}, configs))


def processed() -> nn.Module:
    from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
    from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

    tables = EmbeddingBagCollection(collection_of_width(8).embedding_bag_configs(), is_weighted=True)
    return FeatureProcessedEmbeddingBagCollection(tables, PositionWeightedModuleCollection({"item_id": 5}))


@pytest.mark.parametrize(
    ("make", "name"),
    [(managed, "ManagedCollisionEmbeddingBagCollection"), (processed, "FeatureProcessedEmbeddingBagCollection")],
)
def test_embedding_modules_that_are_not_sharded_are_refused(make: Callable[[], nn.Module], name: str) -> None:
    module = nn.ModuleDict({"tables": make()})
    with pytest.raises(UserError, match=f"tables is a {name}, which shard does not support"):
        plan_tables(module, TablesConfig(), 2, 2, "cpu", is_trained)


def test_a_fused_collection_cannot_be_frozen() -> None:
    tables = collection_of_width(8).embedding_bag_configs()
    module = nn.ModuleDict({"fused": FusedEmbeddingBagCollection(tables, torch.optim.SGD, {"lr": 0.1})})
    with pytest.raises(UserError, match="is to stay as it is, but a FusedEmbeddingBagCollection"):
        plan_tables(module, TablesConfig(), 2, 2, "cpu", lambda table: False)
    assert plan_tables(module, TablesConfig(), 2, 2, "cpu", lambda table: True).plan["fused"]


def collection_of_width(dim: int) -> EmbeddingBagCollection:
    from tests.distributed.small_model import collection

    return collection({"item_id": 10}, dim, {"item_id": "item_id"}, "meta")


@pytest.mark.parametrize(
    ("dim", "ranks", "width"), [(64, 1, 64), (64, 2, 32), (64, 3, 32), (64, 64, 4), (576, 5, 144), (4, 8, 4)]
)
def test_column_width(dim: int, ranks: int, width: int) -> None:
    assert column_width(dim, ranks) == width
