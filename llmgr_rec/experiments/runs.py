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
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from llmgr_rec import __version__
from llmgr_rec.config import STAGES, BlendConfig, Config, trained_stages
from llmgr_rec.config_file import load_config, save_config
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.process_group import choose_device
from llmgr_rec.experiments.controls import effective_controls, factory_of
from llmgr_rec.files import atomic_write
from llmgr_rec.storage.bundle_index import CONFIG, STAGES_OF_MODEL
from llmgr_rec.storage.fingerprint import fingerprint
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.training.preflight import RunRequest
from llmgr_rec.training.train_run import train_run


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

    def trained(self, model: str, config: Config, controls: Collection[str] = ()) -> FinishedRun:
        """A finished run with a model.

        Args:
            model: One of `STAGES_OF_MODEL`.
            config: All settings.
            controls: Some of `CONTROLS`.

        Raises:
            UserError: The data set or a setting is not usable.
        """
        factory = factory_of("sbr", controls)
        run = self._train(self.run_folder("sbr", config, controls), _only_sbr(_unselected(config)), factory)
        if model == "sbr":
            return run
        if _smooths(config):
            run = self._smoothed(run, config, controls)
        return self._train_on(run, model, config, controls)

    def run_folder(self, model: str, config: Config, controls: Collection[str] = ()) -> Path:
        """Folder of the run in which a model is trained, before anything is selected for it."""
        return self.folder / "runs" / f"{model}-{self.key(training_inputs(model, config, controls))}"

    def key(self, *parts: Any) -> str:
        """A hash of what something depends on: the version of this program, the data set and JSON values."""
        known = [__version__, asdict(self.dataset.manifest), *parts]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    def _smoothed(self, trained: FinishedRun, config: Config, controls: Collection[str]) -> FinishedRun:
        """The session recommender of a run, exported again with smoothed id rows; nothing is trained."""
        inputs = training_inputs("sbr", config, controls), smoothing_inputs(config)
        run = self.folder / "runs" / f"smoothed-{self.key(*inputs)}"
        unselected = _unselected(config)
        blend = config.blend if _selects_smoothing(config) else unselected.blend
        settings = replace(unselected, tables=config.tables, blend=blend)
        return self._train(run, _only_sbr(settings), factory_of("sbr", controls), trained, "checkpoints")

    def _train_on(self, before: FinishedRun, model: str, config: Config, controls: Collection[str]) -> FinishedRun:
        """Trains the later stages of a model, in a folder of its own."""
        settings = replace(_unselected(config), tables=config.tables)
        run = self.run_folder(model, config, controls)
        return self._train(run, settings, factory_of(model, controls), before, "export")

    def _train(
        self,
        run: Path,
        config: Config,
        factory: ModelFactory,
        before: FinishedRun | None = None,
        taken_over: str = "",
    ) -> FinishedRun:
        """Trains what a run lacks.

        Args:
            run: Run folder.
            config: All settings, where the run has not been started yet.
            factory: Makes its models.
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
                embeddings = self.folder / "text_embeddings"
                request = RunRequest(settings, self.dataset.path, run, "all", resume=True)
                train_run(replace(request, text_embeddings=embeddings, factory=factory))
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


def training_inputs(model: str, config: Config, controls: Collection[str]) -> dict[str, Any]:
    """What the weights of a model depend on beside the data set, as JSON values.

    Args:
        model: One of `STAGES_OF_MODEL`.
        config: All settings.
        controls: Some of `CONTROLS`.
    """
    device = choose_device(config.runtime.device)
    stages = [stage for stage in trained_stages(config) if stage in ("sbr", *STAGES_OF_MODEL[model])]
    return {
        "runtime": asdict(config.runtime),
        "stages": {stage: fingerprint(stage, config, device) for stage in stages},
        "controls": effective_controls(model, controls),
        "smoothing": [] if model == "sbr" else smoothing_inputs(config),
    }


def smoothing_inputs(config: Config) -> list[Any]:
    """What the smoothing of a session recommender depends on, as JSON values; empty without smoothing."""
    if not _smooths(config):
        return []
    blend = [asdict(config.blend)] if _selects_smoothing(config) else []
    return [config.tables.knn_smoothing, config.blend.k_neighbors, *blend]


def _smooths(config: Config) -> bool:
    return any(config.tables.knn_smoothing)


def _selects_smoothing(config: Config) -> bool:
    """Whether there are several smoothing strengths, of which the best is selected together with the blend."""
    return len(config.tables.knn_smoothing) > 1


def _unselected(config: Config) -> Config:
    """The settings with nothing left to select after training: no blend, no smoothing, text weight 1."""
    return replace(
        config,
        tables=replace(config.tables, knn_smoothing=[0.0]),
        text_encoder=replace(config.text_encoder, score_weight=[1.0]),
        blend=BlendConfig(neighbors=[], k_neighbors=config.blend.k_neighbors),
    )


def _only_sbr(config: Config) -> Config:
    """The settings without the stages after sbr."""
    others: dict[str, Any] = {stage: replace(config.stage(stage), epochs=0) for stage in STAGES if stage != "sbr"}
    return replace(config, **others)
