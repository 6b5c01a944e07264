"""Our session recommender inside another team's TorchRec model: sharded as one, pipelined whole, trained jointly."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast, get_args

import pytest
import torch
from torch import nn, optim
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from llmgr_rec import (
    EncoderConfig,
    TablesConfig,
    World,
    build_encoder,
    init_tables,
    shard,
)
from tests.distributed.small_model import assemble, shard_list
from tests.embedding.ranking_model import (
    NUM_ITEMS,
    SESSION_DIM,
    RankingBatch,
    RankingModel,
    own_collator,
    session_part,
    traffic,
)
from tests.ranks import run_on_ranks

Kind = Literal["whole", "without edges", "without sessions"]
STEPS = 40
# Cross-entropy of a click with probability 1/2, which is all that can be known without the graph's edges.
GUESSING = 0.6931


@dataclass
class Trained:
    """What a rank has to tell after some steps."""

    losses: list[float]
    pipelined: list[str]
    shards: list[Any]


def pipeline_steps(model: nn.Module, world: World, batches: Iterator[RankingBatch], steps: int) -> Trained:
    """Trains as the other team would, with TorchRec's own pipeline and optimizers."""
    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
    from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
    from torchrec.optim.optimizers import in_backward_optimizer_filter

    trained = {n: p for n, p in in_backward_optimizer_filter(model.named_parameters()) if p.requires_grad}
    dense = KeyedOptimizerWrapper(trained, lambda parameters: optim.AdamW(parameters, lr=1e-2))
    optimizer = CombinedOptimizer([("", model.fused_optimizer), ("dense", dense)])
    pipeline = TrainPipelineSparseDist(model, optimizer, world.device)
    model.train()
    losses = [float(pipeline.progress(batches)) for _ in range(steps)]
    names = [module.forward.name for module in pipeline._pipelined_modules]
    pipeline.detach()
    return Trained(losses, sorted(names), shard_list(model))


def own_sharding(model: RankingModel, world: World) -> nn.Module:
    """Shards with nothing of ours: TorchRec's planner, wrapper and defaults, as the other team's code has them."""
    import torch.distributed as dist
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    collections = [part for part in model.modules() if isinstance(part, EmbeddingBagCollection)]
    for collection in collections:
        apply_optimizer_in_backward(optim.Adagrad, collection.parameters(), {"lr": 0.1})
    names = [table.name for collection in collections for table in collection.embedding_bag_configs()]
    constraint = ParameterConstraints(sharding_types=["column_wise"], min_partition=4)
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world.size, compute_device=world.device.type, local_world_size=world.local_size),
        constraints=dict.fromkeys(names, constraint),
    )
    sharders: list[Any] = [EmbeddingBagCollectionSharder()]
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    sharded = DistributedModelParallel(model, device=world.device, plan=plan, sharders=sharders)
    init_tables(sharded, seed=3, std=0.1)
    return sharded


def learn(world: World, kinds: Sequence[Kind]) -> dict[Kind, Trained]:
    return {kind: _learn(world, kind) for kind in kinds}


def _learn(world: World, kind: Kind) -> Trained:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = RankingModel(None if kind == "without sessions" else session_part())
    collator = own_collator()
    batches = (traffic(step, world.rank, world.size, collator, edges=kind != "without edges") for step in range(STEPS))
    return pipeline_steps(own_sharding(model, world), world, batches, STEPS)


@cache
def all_learned() -> list[dict[Kind, Trained]]:
    return run_on_ranks(learn, 2, get_args(Kind))


def learned(kind: Kind) -> list[Trained]:
    return [rank[kind] for rank in all_learned()]


def last_loss(ranks: list[Trained]) -> float:
    return sum(sum(rank.losses[-10:]) for rank in ranks) / 20


@pytest.mark.dist
def test_both_collections_are_pipelined_and_spread_over_both_ranks() -> None:
    ranks = learned("whole")
    assert all(rank.pipelined == ["session.item_tables.ebc", "sparse_arch"] for rank in ranks)
    assert all(rank.pipelined == ["sparse_arch"] for rank in learned("without sessions"))
    tables = {name.split(".")[-2] for name, *_ in ranks[0].shards}
    assert tables == {"item_id", "t_user_id", "t_context"}
    assert {name for name, *_ in ranks[1].shards} == {name for name, *_ in ranks[0].shards}
    whole = assemble([rank.shards for rank in ranks])
    assert whole["session.item_tables.ebc.embedding_bags.item_id.weight"].shape == (NUM_ITEMS, SESSION_DIM)


@pytest.mark.dist
def test_the_whole_learns_what_only_the_session_graph_tells() -> None:
    assert last_loss(learned("whole")) < 0.1
    assert last_loss(learned("without sessions")) > GUESSING - 0.02
    assert last_loss(learned("without edges")) > GUESSING - 0.02


def few_steps(world: World) -> list[Trained]:
    return [_few_steps(world, sharding) for sharding in ("table_wise", "column_wise")]


def _few_steps(world: World, sharding: Literal["table_wise", "column_wise"]) -> Trained:
    torch.manual_seed(0)
    model = shard(RankingModel(session_part()), TablesConfig(sharding=sharding), world, lambda table: True)
    init_tables(model, seed=3, std=0.1)
    collator = own_collator()
    batches = (traffic(step, world.rank, world.size, collator) for step in range(8))
    return pipeline_steps(model, world, batches, 8)


@pytest.mark.dist
def test_two_ranks_train_the_same_model_as_one() -> None:
    (alone,) = run_on_ranks(few_steps, 1)
    together = run_on_ranks(few_steps, 2)
    for number, one in enumerate(alone):
        ranks = [rank[number] for rank in together]
        means = torch.tensor([rank.losses for rank in ranks]).mean(dim=0)
        torch.testing.assert_close(means, torch.tensor(one.losses), atol=1e-5, rtol=0)
        expected = assemble([one.shards])
        for name, table in assemble([rank.shards for rank in ranks]).items():
            torch.testing.assert_close(table, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gcsan", "srgnn"])
def test_an_encoder_built_on_the_meta_device_gets_all_its_values(name: Literal["gcsan", "srgnn"]) -> None:
    """As DistributedModelParallel fills a model that was built on meta: it allocates, then calls reset_parameters."""
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig(name=name), SESSION_DIM)
    encoder.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(torch.nan)
    for module in encoder.modules():
        if hasattr(module, "reset_parameters"):
            cast(nn.Linear, module).reset_parameters()
    bound = SESSION_DIM**-0.5
    for name_, parameter in encoder.named_parameters():
        assert parameter.abs().max() <= bound, name_
        assert parameter.std() > bound / 4, name_
