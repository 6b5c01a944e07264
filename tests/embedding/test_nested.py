"""Our session recommender inside another team's TorchRec model: sharded as one, pipelined whole, trained jointly."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor, nn, optim
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from llmgr_rec import (
    Catalog,
    Collator,
    EncoderConfig,
    SessionRecommender,
    TablesConfig,
    World,
    build_encoder,
    build_recommender,
    export_bundle,
    init_tables,
    load_bundle,
    load_weights,
    shard,
)
from llmgr_rec.storage.table_io import unwrapped_name
from tests.distributed.small_model import assemble, shard_list
from tests.embedding.ranking_model import (
    NUM_ITEMS,
    SESSION_DIM,
    RankingBatch,
    RankingModel,
    own_collator,
    raw_sessions,
    session_part,
    traffic,
)
from tests.ranks import run_on_ranks
from tests.small_run import config, small_run

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


def learn(world: World, kind: Kind) -> Trained:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = RankingModel(None if kind == "without sessions" else session_part())
    collator = own_collator()
    batches = (traffic(step, world.rank, world.size, collator, edges=kind != "without edges") for step in range(STEPS))
    return pipeline_steps(own_sharding(model, world), world, batches, STEPS)


@cache
def learned(kind: Kind) -> list[Trained]:
    return run_on_ranks(learn, 2, kind)


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


def few_steps(world: World, sharding: Literal["table_wise", "column_wise"]) -> Trained:
    torch.manual_seed(0)
    model = shard(RankingModel(session_part()), TablesConfig(sharding=sharding), world, lambda table: True)
    init_tables(model, seed=3, std=0.1)
    collator = own_collator()
    batches = (traffic(step, world.rank, world.size, collator) for step in range(8))
    return pipeline_steps(model, world, batches, 8)


@pytest.mark.dist
@pytest.mark.parametrize("sharding", ["table_wise", "column_wise"])
def test_two_ranks_train_the_same_model_as_one(sharding: str) -> None:
    (alone,) = run_on_ranks(few_steps, 1, sharding)
    together = run_on_ranks(few_steps, 2, sharding)
    means = torch.tensor([rank.losses for rank in together]).mean(dim=0)
    torch.testing.assert_close(means, torch.tensor(alone.losses), atol=1e-5, rtol=0)
    expected = assemble([alone.shards])
    for name, table in assemble([rank.shards for rank in together]).items():
        torch.testing.assert_close(table, expected[name], atol=1e-5, rtol=1e-5)


@dataclass
class Joint:
    """What became of a session recommender that was loaded into a ranking model and trained on with it."""

    left: list[str]
    loaded_BD: Tensor
    trained_BD: Tensor


@torch.no_grad()
def session_vectors(session: SessionRecommender, collator: Collator) -> Tensor:
    """Vectors of some sessions of the bundle's items, some with side features; every rank asks for the same ones."""
    batch = collator(raw_sessions(torch.tensor([3, 5, 3, 59, 7, 0, 1, 2]), torch.tensor([4, 1, 3])))
    return session.eval().encode(batch.features, batch.graph).sessions_BD


def bundle_collator(catalog: Catalog) -> Collator:
    return Collator(catalog, config().tables.side_features)


def train_jointly(world: World, bundle: str, joint: str, into: Literal["model", "part"]) -> Joint:
    """Loads a bundle into the nested part of a sharded model, trains the whole and exports the part."""
    catalog = Catalog.load(bundle)
    session = build_recommender(config(), catalog.num_items, catalog.num_embeddings, "meta")
    model = shard(RankingModel(session), TablesConfig(), world, lambda table: True)
    init_tables(model, seed=99, std=0.3)
    left = load_weights(model if into == "model" else session, bundle)
    collator = bundle_collator(catalog)
    loaded_BD = session_vectors(session, collator)
    pipeline_steps(model, world, (traffic(step, world.rank, world.size, collator) for step in range(3)), 3)
    export_bundle(model, "sbr", config(), catalog, Path(joint), world)
    return Joint(left, loaded_BD, session_vectors(session, collator))


@pytest.mark.dist
@pytest.mark.parametrize(("stage", "into"), [("sbr", "model"), ("behave", "part")])
def test_a_bundle_moves_into_the_nested_part_and_out_again(stage: str, into: str, tmp_path: Path) -> None:
    bundle, joint = small_run().run / "export" / stage, tmp_path / "export" / "sbr"
    joint.parent.mkdir()
    ranks = run_on_ranks(train_jointly, 2, str(bundle), str(joint), into)
    alone = load_bundle(bundle).model
    recommender = alone if isinstance(alone, SessionRecommender) else alone.recommender
    expected_BD = session_vectors(recommender, bundle_collator(small_run().catalog))
    exported = load_bundle(joint)
    assert isinstance(exported.model, SessionRecommender)
    exported_BD = session_vectors(exported.model, bundle_collator(exported.catalog))
    for rank in ranks:
        assert rank.left == []
        torch.testing.assert_close(rank.loaded_BD, expected_BD, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(rank.trained_BD, exported_BD, atol=1e-6, rtol=1e-6)
        assert (rank.trained_BD - rank.loaded_BD).abs().max() > 1e-3


def freeze(world: World) -> dict[str, bool]:
    """Trains a model that leaves its session part and, by an optimizer of its own, its users as they are."""
    model = RankingModel(session_part())
    users = model.sparse_arch.embedding_bags["t_user_id"]
    apply_optimizer_in_backward(optim.SGD, users.parameters(), {"lr": 0.0})
    cast(nn.Module, model.session).encoder.requires_grad_(False)
    sharded = shard(model, TablesConfig(), world, lambda table: not table.startswith("session."))
    init_tables(sharded, seed=3, std=0.1)
    before = local_values(sharded)
    collator = own_collator()
    pipeline_steps(sharded, world, (traffic(step, world.rank, world.size, collator) for step in range(3)), 3)
    after = local_values(sharded)
    return {name: not torch.equal(value, after[name]) for name, value in before.items()}


def local_values(model: nn.Module) -> dict[str, Tensor]:
    tables = {f"{name}/{row}/{col}": tensor for name, row, col, tensor in shard_list(model)}
    dense = {
        unwrapped_name(name): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "embedding_bags" not in name
    }
    return tables | dense


@pytest.mark.dist
def test_a_frozen_session_part_and_a_table_with_its_own_optimizer_stay_as_they_say() -> None:
    for moved in run_on_ranks(freeze, 2):
        still = {name for name, changed in moved.items() if not changed}
        assert {name for name in moved if name.startswith("session.") or ".t_user_id." in name} == still
        assert len(still) > 10
        assert any(".t_context." in name for name in moved)


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
