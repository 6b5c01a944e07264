"""A run that is killed and resumed computes what an uninterrupted one does, at any number of ranks."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from llmgr_rec.config import Config
from llmgr_rec.config_file import load_config, save_config
from llmgr_rec.distributed.process_group import World, barrier
from llmgr_rec.errors import StopRequested
from llmgr_rec.stop_signals import StopSignals
from llmgr_rec.training import loop, stages
from llmgr_rec.training.metrics_logger import MetricsLogger
from tests.ranks import run_on_ranks
from tests.training.exported import Exported
from tests.training.killing import Trainer
from tests.training.small_training import numbers, records, small_config, train

pytestmark = pytest.mark.dist

SBR_STEPS, BEHAVE_STEPS = 24, 12
# Steps at which a run is killed lie between these, in sbr and in behave.
KILLS = {"sbr": (2, SBR_STEPS - 6), "behave": (2, BEHAVE_STEPS - 4)}


def resumable(folder: Path) -> Config:
    config = small_config(folder / "prompts.yaml")
    config.sbr.epochs, config.optimizer.average = 2, 0.7
    config.align.max_steps = 3
    config.runtime.checkpoint_every = 4
    config.runtime.timeout_s = 60
    return config


def train_all(world: World, settings: str, run: str, dataset: str) -> None:
    """Trains, or goes on with, a run; as the command does, in processes that are at hand already."""
    folder = Path(run)
    if world.rank == 0 and not folder.exists():
        folder.mkdir()
        shutil.copy(settings, folder / "config.yaml")
    train(world, load_config(settings), folder, Path(dataset), resume=True)


@dataclass
class Place:
    """Where the tests of a module work.

    Args:
        folder: Holds everything.
        dataset: Prepared sessions.
        settings: Settings file.
        whole: An uninterrupted run on two ranks.
    """

    folder: Path
    dataset: Path
    settings: Path
    whole: Path

    def command(self, run: Path, *words: str) -> list[str]:
        return ["--config", str(self.settings), "--dataset", str(self.dataset), "--output", str(run), *words]

    def resume(self, run: Path, ranks: int) -> None:
        run_on_ranks(train_all, ranks, str(self.settings), str(run), str(self.dataset))

    def copy(self, run: Path, name: str) -> Path:
        return Path(shutil.copytree(run, self.folder / name))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> Place:
    folder = tmp_path_factory.mktemp("resume")
    save_config(resumable(folder), folder / "settings.yaml")
    place = Place(folder, small_dataset, folder / "settings.yaml", folder / "whole")
    place.resume(place.whole, 2)
    return place


def killed_at_random(place: Place, run: Path, stage: str, ranks: int, rng: random.Random, *words: str) -> None:
    """Runs the command and kills it in a stage, a random moment after a random step.

    On a busy machine the kill may come after the end of the stage; then it is tried again from the same state.
    """
    before = place.copy(run, f"{run.name}-before-{stage}") if run.exists() else None
    for _ in range(5):
        step = rng.randint(*KILLS[stage])
        moment = rng.uniform(0, 0.05)
        with Trainer(place.command(run, *words), ranks, place.folder / f"{run.name}.log") as trainer:
            trainer.wait_until(lambda step=step: last_step(run, stage) >= step)
            # Anywhere between two lines: within a step, or while a checkpoint is written.
            trainer.wait_until(waits(moment))
            trainer.kill()
        if not (run / "export" / stage).exists():
            if before is not None:
                shutil.rmtree(before)
            return
        shutil.rmtree(run)
        if before is not None:
            shutil.copytree(before, run)
    pytest.fail(f"stage {stage} ended before each kill")


def waits(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def last_step(run: Path, stage: str) -> int:
    if not (run / "metrics.jsonl").exists():
        return 0
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return sum(line.startswith(f'{{"stage": "{stage}"') and "valid" not in line for line in lines)


def assert_same(run: Path, whole: Path) -> None:
    found, expected = records(run), records(whole)
    assert list(found) == list(expected)
    for key in expected:
        assert found[key] == expected[key], key


def assert_close(run: Path, whole: Path) -> None:
    found, expected = numbers(run), numbers(whole)
    assert found.keys() == expected.keys()
    worst = max(expected, key=lambda name: abs(found[name] - expected[name]))
    assert found[worst] == pytest.approx(expected[worst], abs=1e-5), worst


@dataclass
class Killed:
    """A run on two ranks that was killed twice: as it lay after each, and as it ended."""

    in_sbr: Path
    in_behave: Path
    end: Path


@pytest.fixture(scope="module")
def killed(place: Place) -> Killed:
    run, rng = place.folder / "killed", random.Random(11)
    killed_at_random(place, run, "sbr", 2, rng)
    in_sbr = place.copy(run, "killed-in-sbr")
    # Workers have read ahead when the end comes, and must not outlive it.
    killed_at_random(place, run, "behave", 2, rng, "--resume", "--runtime.reader_workers", "1")
    in_behave = place.copy(run, "killed-in-behave")
    with Trainer(place.command(run, "--resume"), 2, place.folder / "last.log") as trainer:
        trainer.wait()
    return Killed(in_sbr, in_behave, run)


def test_a_killed_run_ends_as_if_nothing_had_happened(place: Place, killed: Killed) -> None:
    steps = [(stage, step) for stage, step, split in records(place.whole) if not split]
    assert steps == [
        *(("sbr", step + 1) for step in range(SBR_STEPS)),
        *(("align", step + 1) for step in range(3)),
        *(("behave", step + 1) for step in range(BEHAVE_STEPS)),
    ]
    assert_same(killed.end, place.whole)
    for stage in ("sbr", "align", "behave"):
        assert weights(killed.end / "export" / stage) == weights(place.whole / "export" / stage)


def weights(bundle: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(bundle)): path.read_bytes() for path in bundle.rglob("*.safetensors")}
    assert any("tables" in name for name in files)
    return files


@pytest.mark.parametrize("ranks", [1, 3])
def test_behave_goes_on_at_any_number_of_ranks(place: Place, killed: Killed, ranks: int) -> None:
    run = place.copy(killed.in_behave, f"behave-on-{ranks}")
    place.resume(run, ranks)
    assert_close(run, place.whole)


def test_an_incomplete_checkpoint_is_passed_over(place: Place, killed: Killed) -> None:
    """And sbr goes on at another number of ranks, with all that follows."""
    run = place.copy(killed.in_sbr, "sbr-on-1")
    steps = run / "checkpoints" / "sbr" / "steps"
    steps.mkdir(parents=True, exist_ok=True)
    whole = place.whole / "checkpoints" / "sbr" / "steps" / f"step-{SBR_STEPS:08d}"
    for name in (f"step-{SBR_STEPS - 1:08d}", f"step-{SBR_STEPS - 1:08d}.tmp"):
        shutil.copytree(whole, steps / name, ignore=shutil.ignore_patterns("COMPLETE"))
    if complete := [path for path in sorted(steps.iterdir()) if (path / "COMPLETE").exists()][1:]:
        (complete[-1] / "COMPLETE").unlink()
    place.resume(run, 1)
    assert_close(run, place.whole)
    one, two = (Exported.read(folder / "export" / "sbr").tables for folder in (run, place.whole))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=0)


def test_a_finished_run_has_nothing_to_resume(place: Place, killed: Killed) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(killed.end.rglob("*")) if "tensorboard" not in str(path)}
    command = place.command(killed.end, "--resume", "--runtime.log_every", "7")
    with Trainer(command, 1, place.folder / "nothing.log") as trainer:
        trainer.wait()
    assert "trained nothing" in (place.folder / "nothing.log").read_text()
    after = {path: path.stat().st_mtime_ns for path in sorted(killed.end.rglob("*")) if "tensorboard" not in str(path)}
    changed = {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {killed.end.name}


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def stop_and_go(world: World, settings: str, folder: str, dataset: str) -> None:
    """Trains once in one go and once with an interruption in each stage, after which nothing but files is left."""
    config = load_config(settings)
    config.encoder.dropout, config.llm.lora_dropout = 0.3, 0.2
    # Logs and checkpoints fall on different steps.
    config.runtime.log_every, config.runtime.checkpoint_every = 3, 4
    for name, stops in (("whole", []), ("stopped", [("sbr", 3), ("sbr", 18), ("align", 3), ("behave", 9)])):
        run = Path(folder, name)
        run.mkdir()
        write = MetricsLogger.write
        for stage, step in stops:
            MetricsLogger.write = stop_at(stage, step, write)  # type: ignore[method-assign]
            with pytest.raises(Interrupted):
                train(world, config, run, Path(dataset), resume=True)
        MetricsLogger.write = write  # type: ignore[method-assign]
        train(world, config, run, Path(dataset), resume=True)


def stop_at(stage: str, step: int, write: Callable[..., None]) -> Callable[..., None]:
    def stopping(self: MetricsLogger, now: str, at: int, **values: Any) -> None:
        write(self, now, at, **values)
        if (now, at) == (stage, step):
            raise Interrupted

    return stopping


def test_random_numbers_go_on_where_they_stopped(place: Place, tmp_path: Path) -> None:
    """Dropout draws what it would have drawn, and means between two lines of metrics.jsonl are over the same steps."""
    run_on_ranks(stop_and_go, 1, str(place.settings), str(tmp_path), str(place.dataset))
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    assert len(records(tmp_path / "whole")) > 15


@dataclass
class Stop:
    """A signal in a step of a stage (counted from 1), or in its validation or export (step 0), and what then holds.

    Args:
        stage: The stage.
        step: The step.
        place: Function of `training.stages` that the signal precedes; empty for a step.
        checkpoint: Step of the newest checkpoint afterwards.
    """

    stage: str
    step: int
    place: str
    checkpoint: int


# A signal in a step stops the run after the next one, or at the end of the epoch (12).
STOPS = [
    Stop("sbr", 5, "", 6),
    Stop("sbr", 12, "", 12),
    Stop("sbr", 0, "evaluate_model", 12),
    Stop("sbr", 0, "export_bundle", 24),
    Stop("align", 1, "", 2),
    Stop("behave", 0, "embed_catalog", 0),
    Stop("behave", 6, "", 7),
]


def stop_and_resume(world: World, settings: str, run: str, dataset: str) -> list[tuple[str, list[str]]]:
    """Trains with a signal at each of `STOPS`: what each attempt raised, and its newest checkpoint."""
    config, folder = load_config(settings), Path(run)
    config.runtime.checkpoint_every = 0
    folder.mkdir(exist_ok=True)
    seen = []
    for stop in STOPS:
        with pytest.MonkeyPatch.context() as patch, StopSignals(grace_s=60) as signals:
            if stop.place:
                patch.setattr(stages, stop.place, signalled)
            elif world.rank == 1:
                # The other rank hears of it from this one.
                patch.setattr(loop, "step_seed", signalled_at(stop, loop.step_seed))
            try:
                train(world, config, folder, Path(dataset), resume=True, signals=signals)
            except StopRequested as error:
                found = sorted((folder / "checkpoints" / stop.stage / "steps").glob("*"))
                seen.append((f"{error}, {error.exit_code}", [path.name for path in found[-1:]]))
        barrier(world)
    train(world, config, folder, Path(dataset), resume=True)
    return seen


def signalled(*arguments: Any, **named: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("the signal was not noticed")


def signalled_at(stop: Stop, seed: Callable[..., int]) -> Callable[..., int]:
    def signalling(base: int, stage: str, step: int, rank: int) -> int:
        if (stage, step + 1) == (stop.stage, stop.step):
            os.kill(os.getpid(), signal.SIGTERM)
        return seed(base, stage, step, rank)

    return signalling


def test_a_signal_stops_all_ranks_at_the_same_step(place: Place) -> None:
    run = place.folder / "signalled"
    seen = run_on_ranks(stop_and_resume, 2, str(place.settings), str(run), str(place.dataset))
    expected = [
        ("stopped by SIGTERM, 143", [f"step-{stop.checkpoint:08d}"] if stop.checkpoint else []) for stop in STOPS
    ]
    assert seen == [expected, expected]
    assert_same(run, place.whole)
    for stage in ("sbr", "align", "behave"):
        assert weights(run / "export" / stage) == weights(place.whole / "export" / stage)


@pytest.mark.slow
def test_the_launcher_restarts_a_run_whose_rank_has_died(place: Place) -> None:
    run = place.folder / "restarted"
    with Trainer(place.command(run), 2, place.folder / "restarted.log", restarts=1) as trainer:
        trainer.wait_until(lambda: last_step(run, "sbr") >= 10)
        trainer.kill_rank(1)
        trainer.wait()
    assert_same(run, place.whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_may_be_killed_at_any_moment(place: Place, ranks: int, seed: int) -> None:
    run, rng = place.folder / f"any-{ranks}-{seed}", random.Random(seed)
    for attempt, stage in enumerate(("sbr", "sbr", "behave", "behave")):
        killed_at_random(place, run, stage, ranks, rng, *(["--resume"] if attempt else []))
    with Trainer(place.command(run, "--resume"), ranks, place.folder / f"{run.name}.log") as trainer:
        trainer.wait()
    if ranks == 2:
        assert_same(run, place.whole)
    else:
        assert_close(run, place.whole)
