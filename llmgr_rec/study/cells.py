"""One cell of the matrix: a variant with a seed, trained and judged once, whoever asks for it and however often.

A run folder is named by a hash of what its training depends on, the data set's files among it, so variants share what
they have in common: all that stand on the same session recommender take over its stage, a blend takes over the model
that it blends, and item texts are encoded once.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from llmgr_rec import __version__
from llmgr_rec.baselines.knn import Baseline
from llmgr_rec.baselines.registry import build_neighbors
from llmgr_rec.config import STAGES, Config, StageName, neighbour_clicks, reader_weights, trained_stages
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.bundle import load_bundle
from llmgr_rec.distributed.bundle_index import find_bundle
from llmgr_rec.distributed.process_group import choose_device
from llmgr_rec.evaluation.prior import BLEND_WEIGHTS
from llmgr_rec.files import atomic_write
from llmgr_rec.modules.recommender import text_reader_of
from llmgr_rec.recipes import load_config, save_config
from llmgr_rec.registry import modules_of
from llmgr_rec.stage_config import RECOMMENDER_STAGES
from llmgr_rec.study.compare import ndcg
from llmgr_rec.study.judge import Places, judge_baseline, judge_model
from llmgr_rec.study.recipe import Study, Variant
from llmgr_rec.training.checks import RunRequest
from llmgr_rec.training.deciding import deciding_settings
from llmgr_rec.training.run import train_run


@dataclass(frozen=True)
class Cell:
    """What came of a variant with a seed.

    Args:
        places_S: Place of each target of the judged split, from 0.
        valid_ndcg: NDCG@20 on the validation sessions.
        weights_N: Factor of each blended baseline, in the variant's order; after them that of a language model which
            reads sessions as text, where there is one.
        seconds: Seconds of training, shared stages included.
    """

    places_S: Places
    valid_ndcg: float
    weights_N: NDArray[np.float64]
    seconds: float


class Bench:
    """Trains and judges cells in a folder, or takes them from there.

    Args:
        folder: Where runs and cells are kept.
        dataset: Prepared sessions.
        split: Split that is judged; validation is used for choices only.
    """

    def __init__(self, folder: Path, dataset: Dataset, split: str) -> None:
        self.folder = folder
        self.dataset = dataset
        self.split = split
        self._baselines: dict[str, Baseline] = {}

    @cached_property
    def catalogue(self) -> Catalogue:
        """The data set's items."""
        return Catalogue.load(self.dataset.path)

    def cell(self, study: Study, variant: Variant, seed: int) -> Cell:
        """The cell, from disk where it has been there before.

        Raises:
            UserError: The data set or a setting is not usable.
        """
        config = study.settings_of(variant, seed)
        file = self._file(variant, config)
        if not file.is_file():
            cell = self._model_cell(variant, config) if variant.trains else self._baseline_cell(variant)
            # Studies of several seeds may run side by side, and all of them need the baselines.
            with atomic_write(file) as partial:
                np.savez_compressed(partial, **asdict(cell))
        with np.load(file) as stored:
            numbers = {name: float(stored[name]) for name in ("valid_ndcg", "seconds")}
            return Cell(places_S=stored["places_S"], weights_N=stored["weights_N"], **numbers)

    def has(self, study: Study, variant: Variant, seed: int) -> bool:
        """Whether the cell is on disk."""
        return self._file(variant, study.settings_of(variant, seed)).is_file()

    def recommender_of(self, study: Study, variant: Variant, seed: int) -> str:
        """Name of the session recommender that a cell stands on, or of the baseline that it is."""
        return self._run("sbr", _as_trained(study.settings_of(variant, seed))).name if variant.trains else variant.model

    def _file(self, variant: Variant, config: Config) -> Path:
        said = [_said(config, variant.model), _reader_weights(config, variant.model)] if variant.trains else []
        return self.folder / "cells" / f"{self._key(variant.model, variant.blend, self.split, *said)}.npz"

    def _baseline_cell(self, variant: Variant) -> Cell:
        baseline = self._baseline(variant.model)
        valid = judge_baseline(baseline, self.dataset, "valid")[0]
        judged = judge_baseline(baseline, self.dataset, self.split)[0]
        return Cell(judged, float(ndcg(valid).mean()), np.empty(0), 0.0)

    def _model_cell(self, variant: Variant, config: Config) -> Cell:
        run, seconds = self._trained(variant.model, config)
        folder = find_bundle(run / "export", variant.model)
        assert folder is not None
        if threads := config.runtime.threads_per_rank:
            torch.set_num_threads(threads)
        # The study names this code itself.
        bundle = load_bundle(folder, allow_code=modules_of([config.encoder.name, config.head.name]))
        neighbours: list[Any] = [self._baseline(name) for name in variant.blend]
        weights, readers = list(product(BLEND_WEIGHTS, repeat=len(neighbours))), [1.0]
        model = bundle.model.to(choose_device(config.runtime.device))
        if (reader := text_reader_of(model)) is not None:
            readers = reader_weights(config)
            # Its own was chosen without the blended ones beside.
            reader.weight.fill_(1.0)
        judge = (bundle.config, self.catalogue, neighbours)
        valid_XS = judge_model(model, self.dataset, "valid", *judge, weights, readers)
        quality_X = [float(ndcg(places_S).mean()) for places_S in valid_XS]
        best = int(np.argmax(quality_X))
        by_reader, blended = list(product(readers, weights))[best]
        if self.split == "valid":
            judged = valid_XS[best]
        else:
            judged = judge_model(model, self.dataset, self.split, *judge, [blended], [by_reader])[0]
        chosen = blended if reader is None else (*blended, by_reader)
        return Cell(judged, quality_X[best], np.array(chosen), seconds)

    def _baseline(self, name: str) -> Baseline:
        if name not in self._baselines:
            # One that ranks alone and has no text to rank by was refused before: see `check_baselines`.
            self._baselines[name] = build_neighbors(name, self.dataset, self.catalogue)
        return self._baselines[name]

    def _trained(self, model: str, config: Config) -> tuple[Path, float]:
        """A finished run and the seconds of its training."""
        as_trained = _as_trained(config)
        run = self._run("sbr", as_trained)
        seconds = self._train(_up_to("sbr", as_trained), run)
        if config.tables.neighbour_clicks:
            before, run = run, self._run("sbr", config)
            seconds += self._export_again(before, _up_to("sbr", config), run)
        if model != "sbr" and config.text.epochs:
            before, run = run, self._run("text", config)
            seconds += self._train_on(before, _up_to("text", config), run)
        if model in RECOMMENDER_STAGES:
            return run, seconds
        before, run = run, self._run(model, config)
        return run, seconds + self._train_on(before, config, run)

    def _export_again(self, trained: Path, config: Config, run: Path) -> float:
        """Exports a finished recommender with its rare rows drawn, and else as it was trained."""

        def begin() -> None:
            run.mkdir()
            # A recommender that is left untrained has none.
            if (trained / "checkpoints").is_dir():
                shutil.copytree(trained / "checkpoints", run / "checkpoints", copy_function=os.link)
            as_trained = load_config(trained / "config.yaml")
            save_config(replace(as_trained, tables=config.tables), run / "config.yaml")

        return self._train(config, run, begin)

    def _train_on(self, before: Path, config: Config, run: Path) -> float:
        """Trains what a finished run lacks, in a folder of its own."""

        def begin() -> None:
            shutil.copytree(before / "export", run / "export", copy_function=os.link)
            save_config(config, run / "config.yaml")

        return self._train(config, run, begin)

    def _train(self, config: Config, run: Path, begin: Callable[[], None] | None = None) -> float:
        """Trains what a run lacks, which `begin` begins; a study beside this one waits, and finds it done."""
        done = run / "seconds"
        locks = self.folder / "locks"
        for folder in (locks, run.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / run.name):
            if not done.is_file():
                started = time.monotonic()
                if begin and not (run / "config.yaml").is_file():
                    shutil.rmtree(run, ignore_errors=True)
                    begin()
                if resume := (run / "config.yaml").is_file():
                    # Another recipe may have begun it, with other settings of stages that come later.
                    config = load_config(run / "config.yaml")
                texts = self.folder / "item_text"
                train_run(RunRequest(config, self.dataset.path, run, "all", resume, item_text=texts))
                done.write_text(f"{time.monotonic() - started:.1f}\n")
            return float(done.read_text())

    def _run(self, model: str, config: Config) -> Path:
        kind = model if model in RECOMMENDER_STAGES else "full"
        return self.folder / "runs" / f"{kind}-{self._key(_said(config, model))}"

    def _key(self, *parts: Any) -> str:
        known = [__version__, asdict(self.dataset.manifest), *parts]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def _said(config: Config, model: str) -> dict[str, Any]:
    """What a trained model depends on: the use of the machine, each of its stages, and what is chosen between them."""
    last = next((stage for stage in RECOMMENDER_STAGES if stage == model), STAGES[-1])
    device = choose_device(config.runtime.device)
    return {
        "runtime": asdict(config.runtime),
        "stages": {stage: deciding_settings(stage, config, device) for stage in trained_stages(_up_to(last, config))},
        "drawn": neighbour_clicks(config),
        "reader": [] if last in RECOMMENDER_STAGES else _reader_weights(config, model),
    }


def _as_trained(config: Config) -> Config:
    """The settings without what is done to rare rows once they are trained."""
    return replace(config, tables=replace(config.tables, neighbour_clicks=0.0))


def _reader_weights(config: Config, model: str) -> list[float]:
    """What a language model which reads sessions as text may count beside the recommender; none where none does."""
    return reader_weights(config) if model != "sbr" and config.text.epochs else []


def _up_to(last: StageName, config: Config) -> Config:
    """The settings without the stages after one."""
    later = STAGES[STAGES.index(last) + 1 :]
    left = {stage: replace(getattr(config, stage), epochs=0) for stage in later}
    return replace(config, **left)
