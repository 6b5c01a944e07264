"""Towers in another team's model on two ranks, with TorchRec's planner, sharders, wrapper, pipelines and checkpoints.

One program makes all observations, because starting ranks takes longer than what they do.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from llmgr_rec import LLMGRTower, SessionTower, TablesConfig, UserError, World, shard
from llmgr_rec.modules.param_groups import param_group
from llmgr_rec.storage.table_io import unwrapped_name
from tests.distributed.small_model import shard_list
from tests.ranks import run_on_ranks
from tests.small_run import NUM_ITEMS, small_run
from tests.towers.ranker import Ranker, optimizer_of, shard_as_the_team_does, stream
from tests.towers.team_tables import bag_collection, fused_collection, sequence_collection

STEPS = 4
TOWERS = ("own", "bags", "sequences", "fused", "llm")


@dataclass
class Seen:
    """What a rank has seen."""

    refusals: dict[str, str] = field(default_factory=dict)
    pipelined: dict[str, list[str]] = field(default_factory=dict)
    scores: list[dict[str, Tensor]] = field(default_factory=list)
    moved: dict[str, bool] = field(default_factory=dict)
    trained: list[dict[str, Tensor]] = field(default_factory=list)
    restored: list[dict[str, Tensor]] = field(default_factory=list)
    by_shard: list[dict[str, Tensor]] = field(default_factory=list)


def bundle(name: str) -> Path:
    return small_run().run / "export" / ("behave" if name == "llm" else "sbr")


def build(name: str, path: str) -> Any:
    meta = torch.device("meta")
    if name == "llm":
        return LLMGRTower.from_bundle(path, trains=["lora"], device=meta)
    given = {"bags": bag_collection, "sequences": sequence_collection, "fused": fused_collection}.get(name)
    return SessionTower.from_bundle(path, item_tables=given and given(meta), device=meta)


def sharded_ranker(world: World, paths: dict[str, str]) -> Any:
    torch.manual_seed(0)
    with torch.device("meta"):
        towers = {name: build(name, path) for name, path in paths.items()}
    return shard_as_the_team_does(Ranker(**towers), world.size)


def evaluate(model: nn.Module, world: World) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Scores of the towers by TorchRec's evaluation pipeline, and the lookups that it starts early."""
    from torchrec.distributed.train_pipeline import EvalPipelineSparseDist

    model.eval()
    pipeline = EvalPipelineSparseDist(model, optimizer_of(model), world.device, pipeline_postproc=True)
    batches = stream(world.rank, NUM_ITEMS, STEPS)
    with torch.no_grad():
        scores = [pipeline.progress(batches) for _ in range(STEPS)]
    names = sorted(module.forward.name for module in pipeline._pipelined_modules)
    pipeline.detach()
    return scores, names


def train(model: nn.Module, world: World) -> list[str]:
    """Trains by TorchRec's pipeline; returns the lookups that it starts early."""
    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

    model.train()
    pipeline = TrainPipelineSparseDist(model, optimizer_of(model), world.device, pipeline_postproc=True)
    batches = stream(world.rank, NUM_ITEMS, STEPS)
    for _ in range(STEPS):
        pipeline.progress(batches)
    names = sorted(module.forward.name for module in pipeline._pipelined_modules)
    pipeline.detach()
    return names


def local_values(model: nn.Module) -> dict[str, Tensor]:
    tables = {f"{name}/{row}/{col}": tensor.clone() for name, row, col, tensor in shard_list(model)}
    dense = {
        unwrapped_name(name): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if not {"embedding_bags", "embeddings"} & set(name.split("."))
    }
    return tables | dense


def refusal(call: Any) -> str:
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def program(world: World, paths: dict[str, str], folder: str) -> Seen:
    """Everything that the tests below look at."""
    import torch.distributed.checkpoint as dcp

    seen = Seen()
    loose = SessionTower.from_bundle(paths["own"])
    lost = shard_as_the_team_does(Ranker(own=loose), world.size)
    (batch,) = stream(0, NUM_ITEMS, 1)
    seen.refusals["loaded, then sharded"] = refusal(lambda: lost(batch))
    model = sharded_ranker(world, paths)
    towers = model.module.towers
    for name in TOWERS:
        seen.refusals[name] = refusal(lambda: model(batch))
        towers[name].load(paths[name])
    seen.scores, seen.pipelined["evaluation"] = evaluate(model, world)
    before = local_values(model)
    seen.pipelined["training"] = train(model, world)
    seen.moved = {name: not torch.equal(value, before[name]) for name, value in local_values(model).items()}
    seen.trained, _ = evaluate(model, world)
    dcp.save(model.state_dict(), checkpoint_id=f"{folder}/checkpoint")
    for name in ("sequences", "llm"):
        towers[name].save(f"{folder}/{name}")
    again = sharded_ranker(world, paths)
    state = again.state_dict()
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
    again.load_state_dict(state)
    seen.restored, _ = evaluate(again, world)
    by_shard = Ranker(**{name: build(name, paths[name]) for name in ("own", "sequences", "fused")})
    sharded = shard(by_shard, TablesConfig(), world, trained=lambda table: True)
    for name, tower in by_shard.towers.items():
        cast(SessionTower, tower).load(paths[name])
    seen.by_shard, _ = evaluate(sharded, world)
    return seen


@cache
def folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="llmgr-towers-")


@pytest.fixture(scope="module", autouse=True)
def _clean_up() -> Iterator[None]:
    yield
    folder().cleanup()


@cache
def seen() -> list[Seen]:
    paths = {name: str(bundle(name)) for name in TOWERS}
    return run_on_ranks(program, 2, paths, folder().name)


def alone(name: str, path: Path, rank: int) -> list[Tensor]:
    """Scores of an unsharded tower for the batches of a rank."""
    tower: Any = (LLMGRTower if name == "llm" else SessionTower).from_bundle(path).eval()
    with torch.no_grad():
        return [tower(batch.sessions)["score"] for batch in stream(rank, NUM_ITEMS, STEPS)]


@pytest.mark.dist
def test_towers_that_were_not_loaded_after_sharding_are_refused_by_name() -> None:
    for rank in seen():
        assert "were lost when it was sharded" in rank.refusals["loaded, then sharded"]
        for name in TOWERS:
            assert f"of {bundle(name)} have not been loaded" in rank.refusals[name]


@pytest.mark.dist
def test_both_pipelines_start_every_lookup_early() -> None:
    towers = ["llm.model.recommender.item_tables.ebc", "llm.model.text_tables"]
    towers += [f"{name}.model.item_tables.ebc" for name in TOWERS if name != "llm"]
    expected = sorted(["sparse_arch", *(f"towers.{name}" for name in towers)])
    for rank in seen():
        assert rank.pipelined == {"evaluation": expected, "training": expected}


@pytest.mark.dist
@pytest.mark.parametrize("name", TOWERS)
def test_a_sharded_tower_scores_like_one_alone_also_without_a_request(name: str) -> None:
    for number, rank in enumerate(seen()):
        for found, expected in zip(rank.scores, alone(name, bundle(name), number), strict=True):
            torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)
    assert [len(scores["own"]) > 0 for scores in seen()[1].scores] == [True, False, True, False]


@pytest.mark.dist
def test_our_shard_takes_every_kind_of_collection() -> None:
    for rank in seen():
        for found, expected in zip(rank.by_shard, rank.scores, strict=True):
            for name, score_C1 in found.items():
                torch.testing.assert_close(score_C1, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.dist
def test_what_trains_moves_and_nothing_else() -> None:
    for rank in seen():
        for name, moved in rank.moved.items():
            group = param_group(name)
            trains = not name.startswith("towers.") or group in (
                ("lora",) if name.startswith("towers.llm") else ("tables", "encoder")
            )
            assert moved == trains, name
        assert {param_group(name) for name, moved in rank.moved.items() if moved} > {"tables", "encoder", "lora"}


def train_all_of_llmgr(world: World, path: str) -> dict[str, bool]:
    """Whether each parameter of LLMGR moves, if all of its groups train."""
    torch.manual_seed(0)
    tower = LLMGRTower.from_bundle(path, trains=LLMGRTower.groups, device="meta")
    model = shard_as_the_team_does(Ranker(llm=tower), world.size)
    tower.load(path)
    before = local_values(tower)
    train(model, world)
    return {name: not torch.equal(value, before[name]) for name, value in local_values(tower).items()}


@pytest.mark.slow
@pytest.mark.dist
def test_all_groups_of_llmgr_can_train() -> None:
    for moved in run_on_ranks(train_all_of_llmgr, 2, str(bundle("llm"))):
        assert {param_group(name) for name, changed in moved.items() if changed} == set(LLMGRTower.groups)
        assert not any(changed for name, changed in moved.items() if param_group(name) is None)


@pytest.mark.dist
def test_a_checkpoint_of_the_model_around_it_restores_a_tower() -> None:
    for rank in seen():
        for before, trained, restored in zip(rank.scores, rank.trained, rank.restored, strict=True):
            for name in TOWERS:
                torch.testing.assert_close(restored[name], trained[name], atol=0, rtol=0)
                assert not len(before[name]) or not torch.equal(before[name], trained[name])


@pytest.mark.dist
@pytest.mark.parametrize("name", ["sequences", "llm"])
def test_a_trained_tower_is_saved_as_a_bundle_with_the_usual_names(name: str) -> None:
    seen()
    path = Path(folder().name, name, "export", bundle(name).name)
    for number, rank in enumerate(seen()):
        for found, expected in zip(rank.trained, alone(name, path, number), strict=True):
            torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)
