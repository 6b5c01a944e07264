"""The loop of a stage: when it stops, validates, logs and saves, which weights it keeps, and what it refuses."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.config import Config
from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.ranking import RankingModel
from llmgr_rec.modules import model_spec
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.modules.tasks import LossAndParts, SbrTask
from llmgr_rec.storage.checkpoint import CheckpointManager
from llmgr_rec.storage.table_io import local_shards
from llmgr_rec.training import loop, stages
from llmgr_rec.training.loop import Position, StageLoop, step_seed
from tests.ranks import run_on_ranks
from tests.training.small_training import BATCH, records, small_config, train

EPOCH = 12  # steps
# Time of each checkpoint by the clock of the loop; a step takes far less.
CHECKPOINT_S = 100_000.0

torch.fx.wrap("remade")


@dataclass
class Observed:
    """One training run.

    Args:
        error: Type and text of the exception that ended it.
        validated: The item table at each validation.
        trained: The item table after the last step.
        exported: The item table that was exported.
    """

    error: str = ""
    validated: list[Tensor] = field(default_factory=list)
    trained: Tensor | None = None
    exported: Tensor | None = None


def remade(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(features.keys(), features.values(), lengths=features.lengths(), stride=features.stride())


class ChangesItsBatch(SbrTask):
    """Makes its bags in forward, where a pipeline cannot look them up ahead."""

    def forward(self, batch: SessionBatch) -> LossAndParts:
        rows = self.recommender.item_tables(remade(batch.features))
        return rows.sum(), {"loss": rows.sum().detach()}


def stop_at_best(config: Config) -> None:
    config.sbr.epochs, config.sbr.patience, config.optimizer.average = 8, 2, 0


def stop_within_epoch(config: Config) -> None:
    config.sbr.epochs, config.sbr.max_steps = 3, EPOCH + 3
    config.runtime.checkpoint_every = 5


def seldom(config: Config) -> None:
    config.sbr.epochs, config.runtime.eval_every = 3, 2
    config.runtime.log_every, config.runtime.checkpoint_every, config.runtime.keep_checkpoints = 5, 8, 3


def seldom_but_every_step_logged(config: Config) -> None:
    seldom(config)
    config.runtime.log_every = 1


def without_validation(config: Config) -> None:
    config.sbr.epochs, config.runtime.eval_every = 2, 0
    config.runtime.keep_checkpoints = 1
    config.optimizer.average = 0


def averaged(config: Config) -> None:
    config.sbr.epochs, config.optimizer.average = 2, 0.5


def no_training(config: Config) -> None:
    config.sbr.epochs = 0


def diverges(config: Config) -> None:
    config.tables.optimizer, config.tables.lr = "sgd", 1e38
    config.encoder.score = "dot"


CASES: dict[str, tuple[Callable[[Config], None], list[float]]] = {
    "stop_at_best": (stop_at_best, [0.1, 0.5, 0.4, 0.5, 0.9]),
    "stop_within_epoch": (stop_within_epoch, [0.1, 0.2]),
    "seldom": (seldom, [0.2, 0.1]),
    "every_step": (seldom_but_every_step_logged, [0.2, 0.1]),
    "without_validation": (without_validation, []),
    "averaged": (averaged, [0.5, 0.1]),
    "no_training": (no_training, []),
    "diverges": (diverges, []),
    "changes_its_batch": (lambda config: None, []),
}


def run_cases(world: World, folder: str, dataset: str) -> dict[str, Observed]:
    """Trains each case with validation results as they stand in `CASES`."""
    found = {}
    for name, (change, scores) in CASES.items():
        config = small_config(Path(folder, "prompts.yaml"))
        config.align.epochs = config.behave.epochs = 0
        change(config)
        run = Path(folder, name)
        run.mkdir()
        if name == "seldom":
            # As a run leaves it that was killed before its first checkpoint.
            (run / "metrics.jsonl").write_text('{"stage": "sbr", "step": 5, "loss": 1}\n{"stage": "sbr", "st')
        found[name] = observe(world, config, run, Path(dataset), scores, SbrTask if name[0] != "c" else ChangesItsBatch)
    return found


def observe(
    world: World, config: Config, run: Path, dataset: Path, scores: list[float], task: type[SbrTask]
) -> Observed:
    seen = Observed()

    def validate(ranking: RankingModel, *rest: Any) -> dict[str, float]:
        seen.validated.append(item_table(ranking.model))
        return {"ndcg@20": scores[len(seen.validated) - 1]}

    def export(model: SessionRecommender, *rest: Any) -> None:
        seen.exported = item_table(model)

    def save_slowly(self: CheckpointManager, *arguments: Any) -> None:
        nonlocal late_s
        save(self, *arguments)
        late_s += CHECKPOINT_S

    def end_epoch(self: StageLoop, position: Position) -> None:
        seen.trained = item_table(self.model)
        ends(self, position)

    late_s = 0.0
    ends, save = StageLoop._end_epoch, CheckpointManager.save
    before = (stages.evaluate_model, stages.export_bundle, model_spec.SbrTask)
    stages.evaluate_model, stages.export_bundle, model_spec.SbrTask = validate, export, task
    StageLoop._end_epoch, CheckpointManager.save = end_epoch, save_slowly  # type: ignore[method-assign]
    loop.time = SimpleNamespace(  # type: ignore[assignment]
        perf_counter=lambda: time.perf_counter() + late_s, monotonic=time.monotonic
    )
    try:
        train(world, config, run, dataset, resume=True)
    except Exception as error:
        seen.error = f"{type(error).__name__}: {error}"
    finally:
        stages.evaluate_model, stages.export_bundle, model_spec.SbrTask = before
        StageLoop._end_epoch, CheckpointManager.save = ends, save  # type: ignore[method-assign]
        loop.time = time
    return seen


def item_table(model: torch.nn.Module) -> Tensor:
    return next(shard.tensor.clone() for shard in local_shards(model) if shard.table == "item_id")


@dataclass
class Cases:
    folder: Path
    observed: dict[str, Observed]

    def steps(self, case: str, split: str = "") -> list[int]:
        return [step for _, step, kind in records(self.folder / case) if kind == split]

    def speeds(self, case: str) -> list[float]:
        lines = map(json.loads, (self.folder / case / "metrics.jsonl").read_text().splitlines())
        return [line["examples_per_s"] for line in lines if "loss" in line]

    def losses(self, case: str) -> dict[int, float]:
        return {step: record["loss"] for (_, step, split), record in records(self.folder / case).items() if not split}

    def checkpoints(self, case: str, kind: str = "steps") -> dict[int, dict[str, Any]]:
        folder = self.folder / case / "checkpoints" / "sbr" / kind
        states = [json.loads((path / "state.json").read_text()) for path in sorted(folder.glob("step-*"))]
        return {state["step"]: state["extra"]["position"] for state in states}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> Cases:
    folder = tmp_path_factory.mktemp("loop")
    (observed,) = run_on_ranks(run_cases, 1, str(folder), str(small_dataset))
    return Cases(folder, observed)


@pytest.mark.dist
def test_the_best_weights_are_the_result(cases: Cases) -> None:
    seen = cases.observed["stop_at_best"]
    assert seen.error == ""
    assert cases.steps("stop_at_best", "valid") == [EPOCH, 2 * EPOCH, 3 * EPOCH, 4 * EPOCH], "patience is 2"
    assert seen.exported is not None
    assert torch.equal(seen.exported, seen.validated[1])
    assert not torch.equal(seen.exported, seen.validated[3])
    assert list(cases.checkpoints("stop_at_best", "best")) == [2 * EPOCH]
    assert cases.checkpoints("stop_at_best")[4 * EPOCH] == asdict(Position(4, 0, 4 * EPOCH, 0.5, 2))


@pytest.mark.dist
def test_max_steps_ends_a_stage_within_an_epoch(cases: Cases) -> None:
    last = EPOCH + 3
    assert cases.observed["stop_within_epoch"].error == ""
    assert cases.steps("stop_within_epoch") == list(range(1, last + 1))
    assert cases.steps("stop_within_epoch", "valid") == [EPOCH, last]
    # The checkpoint of the last step knows of the validation after it.
    assert cases.checkpoints("stop_within_epoch") == {
        EPOCH: asdict(Position(1, 0, EPOCH, 0.1, 0)),
        last: asdict(Position(2, 0, last, 0.2, 0)),
    }


@pytest.mark.dist
def test_log_lines_cover_each_step_once(cases: Cases) -> None:
    """Every fifth step and every end of an epoch (12, 24) close a window."""
    lines = [5, 10, 12, 15, 20, 24, 25, 30, 35, 36]
    assert cases.steps("seldom") == lines
    assert cases.steps("seldom", "valid") == [2 * EPOCH, 3 * EPOCH]
    each, means = cases.losses("every_step"), cases.losses("seldom")
    for start, end in pairwise([0, *lines]):
        window = [each[step] for step in range(start + 1, end + 1)]
        assert means[end] == pytest.approx(sum(window) / len(window), rel=1e-6), end
    assert list(cases.checkpoints("seldom")) == [24, 32, 36]


@pytest.mark.dist
@pytest.mark.parametrize("case", ["seldom", "every_step"])
def test_the_time_of_a_checkpoint_is_no_training_time(cases: Cases, case: str) -> None:
    """Neither within a window nor between two."""
    assert min(cases.speeds(case)) > EPOCH * BATCH / CHECKPOINT_S


@pytest.mark.dist
def test_without_validation_the_last_weights_are_the_result(cases: Cases) -> None:
    seen = cases.observed["without_validation"]
    assert cases.steps("without_validation", "valid") == []
    assert not (cases.folder / "without_validation/checkpoints/sbr/best").exists()
    assert seen.exported is not None
    assert seen.trained is not None
    assert torch.equal(seen.exported, seen.trained)
    assert list(cases.checkpoints("without_validation")) == [2 * EPOCH]


@pytest.mark.dist
def test_the_mean_of_the_last_weights_is_the_result_whatever_was_validated(cases: Cases) -> None:
    seen = cases.observed["averaged"]
    assert seen.error == ""
    assert cases.steps("averaged", "valid") == [EPOCH, 2 * EPOCH]
    assert not (cases.folder / "averaged/checkpoints/sbr/best").exists()
    assert seen.exported is not None
    assert seen.trained is not None
    assert torch.equal(seen.exported, seen.validated[1])
    assert not torch.equal(seen.exported, seen.trained)
    torch.testing.assert_close(seen.exported, seen.trained, atol=0.2, rtol=0)


@pytest.mark.dist
def test_a_stage_of_no_epochs_exports_what_it_starts_from(cases: Cases) -> None:
    seen = cases.observed["no_training"]
    assert seen.error == ""
    assert seen.exported is not None
    assert seen.trained is None


@pytest.mark.dist
def test_a_loss_that_is_not_finite_ends_the_run(cases: Cases) -> None:
    error = cases.observed["diverges"].error
    assert error.startswith("UserError: stage sbr: the loss is not finite at step ")
    assert "lower --sbr.lr or --tables.lr" in error


@pytest.mark.dist
def test_a_batch_changed_in_forward_is_refused(cases: Cases) -> None:
    assert cases.observed["changes_its_batch"].error == (
        "RuntimeError: stage sbr: no lookup was pipelined; does forward change the batch before it?"
    )


def test_step_seeds_differ_in_seed_stage_step_and_rank() -> None:
    seeds = {
        step_seed(seed, stage, step, rank)
        for seed in (0, 1, 2**63 - 1)
        for stage in ("sbr", "align", "behave")
        for step in range(200)
        for rank in range(8)
    }
    assert len(seeds) == 3 * 3 * 200 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(3, "sbr", 5, 1) == step_seed(3, "sbr", 5, 1)


def test_dropout_of_neighboring_ranks_and_steps_is_unrelated() -> None:
    draws = []
    for step in range(20):
        for rank in range(4):
            torch.manual_seed(step_seed(0, "sbr", step, rank))
            draws.append(torch.rand(2000))
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    # Of 3160 pairs the largest of unrelated ones is about 3.6 standard deviations of 1 / sqrt(2000).
    assert correlations.abs().max() < 6 / 2000**0.5


def test_a_position_survives_json() -> None:
    position = Position(epoch=2, epoch_step=7, step=31, best=0.123456789012345678, stale=1)
    assert Position(**json.loads(json.dumps(asdict(position)))) == position
    assert replace(position, step=32) != position


def test_the_loop_names_a_metric_that_is_measured() -> None:
    assert loop.SELECTION_METRIC == "ndcg@20"
