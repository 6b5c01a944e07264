"""Training runs that the trials of a folder share: nothing is trained twice.

A run folder is named by a hash of everything that its weights depend on, the data set's files included. What is
selected after training (blend, smoothing strength, text weight) is not part of it: a trial selects that in memory. The
exception is a stage that starts from a smoothed session recommender, which is exported once more for it.
"""

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from llmgr_rec import __version__
from llmgr_rec.config import STAGES, Config, PriorConfig, StageName, neighbour_clicks, trained_stages
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.bundle_index import CONFIG
from llmgr_rec.distributed.process_group import choose_device
from llmgr_rec.files import atomic_write
from llmgr_rec.recipes import load_config, save_config
from llmgr_rec.stage_config import RECOMMENDER_STAGES
from llmgr_rec.training.checks import RunRequest
from llmgr_rec.training.deciding import deciding_settings
from llmgr_rec.training.run import train_run


@dataclass(frozen=True)
class FinishedRun:
    """A run whose stages are complete.

    Args:
        folder: Run folder.
        seconds: Seconds of training, those of the runs that it goes on from included.
    """

    folder: Path
    seconds: float


class SharedRuns:
    """Trains runs in a folder, or finds them there.

    Args:
        folder: Where runs are kept. Several processes may use it at once: one that needs a run that another one trains
            waits for it.
        dataset: Prepared sessions.
    """

    def __init__(self, folder: Path, dataset: Dataset) -> None:
        self.folder = folder
        self.dataset = dataset

    def trained(self, model: str, config: Config) -> FinishedRun:
        """A finished run with a model.

        Args:
            model: One of `STAGES_OF_MODEL`.
            config: All settings.

        Raises:
            UserError: The data set or a setting is not usable.
        """
        run = self._train(self.run_folder("sbr", config), _up_to("sbr", _unselected(config)))
        if model == "sbr":
            return run
        return self._train_on(self._smoothed(run, config) if _smooths(config) else run, model, config)

    def run_folder(self, model: str, config: Config) -> Path:
        """Folder of the run in which a model is trained, before anything is selected for it."""
        kind = model if model in RECOMMENDER_STAGES else "full"
        return self.folder / "runs" / f"{kind}-{self.key(training_inputs(model, config))}"

    def key(self, *parts: Any) -> str:
        """A hash of what something depends on: the version of this program, the data set and JSON values."""
        known = [__version__, asdict(self.dataset.manifest), *parts]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    def _smoothed(self, trained: FinishedRun, config: Config) -> FinishedRun:
        """The session recommender of a run, exported again with smoothed id rows; nothing is trained."""
        run = self.folder / "runs" / f"smoothed-{self.key(training_inputs('sbr', config), smoothing_inputs(config))}"
        prior = config.prior if _selects_smoothing(config) else PriorConfig(kept=config.prior.kept)
        settings = replace(_unselected(config), tables=config.tables, prior=prior)
        return self._train(run, _up_to("sbr", settings), trained, "checkpoints")

    def _train_on(self, before: FinishedRun, model: str, config: Config) -> FinishedRun:
        """Trains the later stages of a model, in a folder of its own."""
        settings = replace(_unselected(config), tables=config.tables)
        last: StageName = "text" if model == "text" else STAGES[-1]
        return self._train(self.run_folder(model, config), _up_to(last, settings), before, "export")

    def _train(self, run: Path, config: Config, before: FinishedRun | None = None, taken_over: str = "") -> FinishedRun:
        """Trains what a run lacks.

        Args:
            run: Run folder.
            config: All settings, where the run has not been started yet.
            before: Run that it goes on from.
            taken_over: Subfolder of that run which it starts with.
        """
        done = run / "seconds"
        locks = self.folder / "locks"
        for folder in (locks, run.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / run.name):
            if not done.is_file():
                started = time.monotonic()
                if not (run / CONFIG).is_file():
                    _start(run, config, before.folder / taken_over if before else None)
                # It may have been started with other settings of stages that this run does not have.
                settings = load_config(run / CONFIG)
                texts = self.folder / "item_text"
                train_run(RunRequest(settings, self.dataset.path, run, "all", resume=True, item_text=texts))
                done.write_text(f"{time.monotonic() - started:.1f}\n")
            seconds = float(done.read_text())
        return FinishedRun(run, seconds + (before.seconds if before else 0.0))


def _start(run: Path, config: Config, taken_over: Path | None) -> None:
    """Makes a run folder; its settings come last, because a folder with settings counts as started."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    # A session recommender without epochs has no checkpoints.
    if taken_over and taken_over.is_dir():
        shutil.copytree(taken_over, run / taken_over.name, copy_function=os.link)
    with atomic_write(run / CONFIG) as partial:
        save_config(config, partial)


def training_inputs(model: str, config: Config) -> dict[str, Any]:
    """What the weights of a model depend on beside the data set, as JSON values.

    Args:
        model: One of `STAGES_OF_MODEL`.
        config: All settings.
    """
    last = next((stage for stage in RECOMMENDER_STAGES if stage == model), STAGES[-1])
    device = choose_device(config.runtime.device)
    return {
        "runtime": asdict(config.runtime),
        "stages": {stage: deciding_settings(stage, config, device) for stage in trained_stages(_up_to(last, config))},
        "smoothing": [] if model == "sbr" else smoothing_inputs(config),
    }


def smoothing_inputs(config: Config) -> list[Any]:
    """What the smoothing of a session recommender depends on, as JSON values; empty without smoothing."""
    if not _smooths(config):
        return []
    blend = [asdict(config.prior)] if _selects_smoothing(config) else []
    return [neighbour_clicks(config), config.prior.kept, *blend]


def _smooths(config: Config) -> bool:
    return any(neighbour_clicks(config))


def _selects_smoothing(config: Config) -> bool:
    """Whether there are several smoothing strengths, of which the best is selected with the neighbors blended."""
    return len(neighbour_clicks(config)) > 1


def _unselected(config: Config) -> Config:
    """The settings with nothing left to select after training: no neighbors, no smoothing, text weight 1."""
    tables, text = replace(config.tables, neighbour_clicks=0.0), replace(config.text, score_weight=1.0)
    return replace(config, tables=tables, text=text, prior=PriorConfig(kept=config.prior.kept))


def _up_to(last: StageName, config: Config) -> Config:
    """The settings without the stages after one."""
    later = STAGES[STAGES.index(last) + 1 :]
    return replace(config, **{stage: replace(getattr(config, stage), epochs=0) for stage in later})
