"""Training runs that trials share, so that no model is trained twice.

A run folder is named by a hash of all inputs of its weights, the files of the data set included. Values that are
selected after training (blend, smoothing strength, text weight) are not part of it, because trials select them in
memory. An exception are stages after sbr, which start from the smoothed session recommender: it is exported again.
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
from llmgr_rec.errors import UserError
from llmgr_rec.experiments.controls import effective_controls, factory_of
from llmgr_rec.files import atomic_write
from llmgr_rec.storage.bundle_index import CONFIG, STAGES_OF_MODEL
from llmgr_rec.storage.fingerprint import fingerprint
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.training.preflight import RunRequest, resolve_one_pass
from llmgr_rec.training.train_run import train_run


@dataclass(frozen=True)
class FinishedRun:
    """A run whose stages are complete.

    Args:
        folder: Run folder.
        seconds: Training time in seconds, that of the runs that it starts from included.
    """

    folder: Path
    seconds: float


class SharedRuns:
    """Trains runs in a folder and reuses those that exist.

    Args:
        folder: Parent folder of the runs. Several processes may use it: file locks make them wait for a run that
            another process trains.
        dataset: Prepared sessions.
    """

    def __init__(self, folder: Path, dataset: Dataset) -> None:
        self.folder = folder
        self.dataset = dataset

    def trained(self, model: str, config: Config, controls: Collection[str] = ()) -> FinishedRun:
        """A finished run with a model, trained if it does not exist.

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
        """Folder of the run in which a model is trained; see `trained` for the arguments."""
        return self.folder / "runs" / f"{model}-{self.key(training_inputs(model, config, controls))}"

    def key(self, *parts: Any) -> str:
        """Hash of the package version, the data set and further inputs.

        Args:
            *parts: JSON values.
        """
        inputs = [__version__, asdict(self.dataset.manifest), *parts]
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]

    def _smoothed(self, trained: FinishedRun, config: Config, controls: Collection[str]) -> FinishedRun:
        """A run that exports the session recommender of another run with smoothed id rows, without training."""
        inputs = training_inputs("sbr", config, controls), smoothing_inputs(config)
        run = self.folder / "runs" / f"smoothed-{self.key(*inputs)}"
        unselected = _unselected(config)
        blend = config.blend if _selects_smoothing(config) else unselected.blend
        settings = replace(unselected, tables=config.tables, blend=blend)
        return self._train(run, _only_sbr(settings), factory_of("sbr", controls), trained, "checkpoints")

    def _train_on(self, before: FinishedRun, model: str, config: Config, controls: Collection[str]) -> FinishedRun:
        """Trains the stages of a model after sbr, in a separate run folder."""
        settings = replace(_unselected(config), tables=config.tables)
        run = self.run_folder(model, config, controls)
        return self._train(run, settings, factory_of(model, controls), before, "export")

    def _train(
        self,
        run: Path,
        config: Config,
        factory: ModelFactory,
        before: FinishedRun | None = None,
        inherited: str = "",
    ) -> FinishedRun:
        """Trains the stages of a run that are not complete.

        Args:
            run: Run folder.
            config: All settings. A run that has already been started keeps its own, which may differ only in settings
                that its weights do not depend on.
            factory: Builds its models.
            before: Run that it starts from.
            inherited: Subfolder of that run to copy by hard links.

        Raises:
            UserError: The data set or a setting is not usable, or the run was started with other settings.
        """
        config = resolve_one_pass(config, self.dataset)
        done = run / "seconds"
        locks = self.folder / "locks"
        for folder in (locks, run.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / run.name):
            if not done.is_file():
                started = time.monotonic()
                if not (run / CONFIG).is_file():
                    _start(run, config, before.folder / inherited if before else None)
                # They may differ from `config` in settings that do not affect the stages of this run.
                settings = load_config(run / CONFIG)
                _check_settings(run / CONFIG, settings, config)
                embeddings = self.folder / "text_embeddings"
                request = RunRequest(settings, self.dataset.path, run, "all", resume=True)
                train_run(replace(request, text_embeddings=embeddings, factory=factory))
                with atomic_write(done) as partial:
                    partial.write_text(f"{time.monotonic() - started:.1f}\n")
            seconds = _read_seconds(done)
        return FinishedRun(run, seconds + (before.seconds if before else 0.0))


def _check_settings(file: Path, found: Config, config: Config) -> None:
    """Checks that a run which was started trains what its name says; a damaged file may name another variant.

    Raises:
        UserError: A setting that the weights depend on differs.
    """
    device = choose_device(config.runtime.device)
    model = file.parent.name.split("-")[0]
    named = [stage for stage in trained_stages(config) if stage in ("sbr", *STAGES_OF_MODEL.get(model, ()))]
    if any(fingerprint(stage, found, device) != fingerprint(stage, config, device) for stage in named):
        raise UserError(
            f"{file} has other settings than those that its run was started with; delete {file.parent} to train again"
        )


def _read_seconds(file: Path) -> float:
    try:
        return float(file.read_text())
    except ValueError:
        raise UserError(f"{file} is damaged: it contains no number; delete it to check its run again") from None


def _start(run: Path, config: Config, inherited: Path | None) -> None:
    """Creates a run folder; the settings are written last, because they mark it as started."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    # A session recommender with 0 epochs has no checkpoints.
    if inherited and inherited.is_dir():
        shutil.copytree(inherited, run / inherited.name, copy_function=os.link)
    with atomic_write(run / CONFIG) as partial:
        save_config(config, partial)


def training_inputs(model: str, config: Config, controls: Collection[str]) -> dict[str, Any]:
    """Inputs of the weights of a model, except the data set, as JSON values.

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
    """Inputs of the smoothing of a session recommender, as JSON values; empty without smoothing."""
    if not _smooths(config):
        return []
    blend = [asdict(config.blend)] if _selects_smoothing(config) else []
    return [config.tables.knn_smoothing, config.blend.k_neighbors, *blend]


def _smooths(config: Config) -> bool:
    return any(config.tables.knn_smoothing)


def _selects_smoothing(config: Config) -> bool:
    """Whether there are several smoothing strengths to select from, together with the blend."""
    return len(config.tables.knn_smoothing) > 1


def _unselected(config: Config) -> Config:
    """The settings without selection after training: no blend, no smoothing, text weight 1."""
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
