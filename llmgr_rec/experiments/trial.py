"""Trials: a variant with a seed, trained and evaluated once for all experiments of a folder."""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmgr_rec.baselines.builders import build_baseline
from llmgr_rec.baselines.in_domains import in_domains
from llmgr_rec.config import Config
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.process_group import World, choose_device
from llmgr_rec.errors import UserError
from llmgr_rec.experiments.compare import K, ndcg
from llmgr_rec.experiments.controls import factory_of
from llmgr_rec.experiments.experiment import Experiment, Variant
from llmgr_rec.experiments.runs import SharedRuns, training_inputs
from llmgr_rec.experiments.target_ranks import TargetRanks, baseline_ranks, model_ranks
from llmgr_rec.files import atomic_write
from llmgr_rec.storage.bundle import Bundle, load_bundle
from llmgr_rec.storage.bundle_index import find_bundle
from llmgr_rec.storage.embedding_model import EmbeddingModel
from llmgr_rec.training.selection import Selection, select_on_validation


@dataclass(frozen=True)
class Trial:
    """The result of a variant with a seed.

    Args:
        target_ranks_S: Rank of each session's target, from 0; see `target_ranks.model_ranks`.
        valid_ndcg: NDCG@20 on the validation sessions.
        selected: Values selected on validation, by name, such as the blend weights.
        seconds: Training time in seconds, that of shared runs included.
        depth: Length of the ranked lists; the rank of a target that is not in the list.
    """

    target_ranks_S: TargetRanks
    valid_ndcg: float
    selected: dict[str, float]
    seconds: float
    depth: int = K

    def save(self, file: Path) -> None:
        """Writes the trial to an npz file, without pickle."""
        names, values = list(self.selected), list(self.selected.values())
        fields = asdict(self) | {"selected": np.array(names, np.str_), "selected_values": np.array(values, np.float64)}
        np.savez_compressed(file, **fields)

    @classmethod
    def load(cls, file: Path) -> "Trial":
        """Reads a trial from a file of `save`.

        Raises:
            UserError: The file is damaged.
        """
        try:
            # np.load would not close a damaged file that it opened itself.
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
                selected = dict(zip(stored["selected"].tolist(), stored["selected_values"].tolist(), strict=True))
                return cls(
                    stored["target_ranks_S"],
                    float(stored["valid_ndcg"]),
                    selected,
                    float(stored["seconds"]),
                    int(stored["depth"]),
                )
        except Exception as error:
            # numpy, zipfile and zlib have errors of many types for it.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{file} is damaged ({reason}); delete it to run its trial again") from None


class TrialRunner:
    """Trains and evaluates trials, and stores them in a folder.

    Args:
        folder: Folder of runs and trials.
        dataset: Prepared sessions.
        split: Split to evaluate.
        depth: Length of the ranked lists, the largest cutoff of the metrics.
    """

    def __init__(self, folder: Path, dataset: Dataset, split: str, depth: int = K) -> None:
        self.folder = folder
        self.dataset = dataset
        self.split = split
        self.depth = depth
        self.runs = SharedRuns(folder, dataset)

    @cached_property
    def catalog(self) -> Catalog:
        """The data set's items."""
        return Catalog.of(self.dataset)

    def trial(self, experiment: Experiment, variant: Variant, seed: int) -> Trial:
        """A trial, read from disk if it exists and run otherwise.

        Args:
            experiment: Experiment of the variant.
            variant: The variant, without a grid.
            seed: Seed of the training.

        Raises:
            UserError: The data set or a setting is not usable.
        """
        config = experiment.config_of(variant, seed)
        file = self._file(variant, config)
        if not file.is_file():
            trial = self._run_model(variant, config) if variant.trains else self._run_baseline(variant.model)
            # Atomic, because parallel experiments share baselines and may write the same file.
            with atomic_write(file) as partial:
                trial.save(partial)
        return Trial.load(file)

    def has(self, experiment: Experiment, variant: Variant, seed: int) -> bool:
        """Whether a trial is on disk."""
        return self._file(variant, experiment.config_of(variant, seed)).is_file()

    def recommender_of(self, experiment: Experiment, variant: Variant, seed: int) -> str:
        """Name of the run of a trial's session recommender, or of its baseline."""
        if not variant.trains:
            return variant.model
        return self.runs.run_folder("sbr", experiment.config_of(variant, seed), variant.controls).name

    def _file(self, variant: Variant, config: Config) -> Path:
        inputs: list[Any] = []
        if variant.trains:
            training = training_inputs(variant.model, config, variant.controls)
            inputs = [training, _selection_inputs(variant.model, config)]
        return self.folder / "trials" / f"{self.runs.key(variant.model, self.split, self.depth, *inputs)}.npz"

    def _run_baseline(self, name: str) -> Trial:
        baseline = in_domains(build_baseline(name, self.dataset, self.catalog), self.catalog.domains)
        valid_ndcg = float(ndcg(baseline_ranks(baseline, self.dataset, "valid")).mean())
        return Trial(baseline_ranks(baseline, self.dataset, self.split, self.depth), valid_ndcg, {}, 0.0, self.depth)

    def _run_model(self, variant: Variant, config: Config) -> Trial:
        run = self.runs.trained(variant.model, config, variant.controls)
        if threads := config.runtime.threads_per_rank:
            torch.set_num_threads(threads)
        bundle, selection = self._selected(run.folder, variant, config)
        ranks_S = model_ranks(bundle, self.dataset, self.split, self.depth)
        metrics = dict(selection.metrics)
        valid_ndcg = metrics.pop("ndcg@20", None)
        if valid_ndcg is None:
            valid_S = ranks_S if self.split == "valid" else model_ranks(bundle, self.dataset, "valid")
            valid_ndcg = float(ndcg(valid_S).mean())
        return Trial(ranks_S, valid_ndcg, metrics, run.seconds, self.depth)

    def _selected(self, run: Path, variant: Variant, config: Config) -> tuple[Bundle, Selection]:
        """A run's bundle with the values selected on validation under a variant's settings."""
        folder = find_bundle(run / "export", variant.model)
        assert folder is not None
        # Smoothing changes the tables, which are fixed in other formats.
        factory = factory_of(variant.model, variant.controls)
        bundle = load_bundle(folder, factory=factory, table_dtype="float32")
        device = choose_device(config.runtime.device)
        bundle.model.to(device)
        selection = select_on_validation(
            bundle.stage,
            bundle.ranking(),
            _with_selection_of(config, bundle),
            self.dataset,
            self.catalog,
            World.alone(device),
            self.folder / "neighbors",
        )
        return replace(bundle, blend=selection.blend), selection


def _with_selection_of(config: Config, bundle: Bundle) -> Config:
    """The settings of a bundle, with those of a variant for the values selected after training."""
    smoothing = config.tables.knn_smoothing if bundle.stage == "sbr" else bundle.config.tables.knn_smoothing
    return replace(
        bundle.config,
        tables=replace(bundle.config.tables, knn_smoothing=smoothing),
        text_encoder=replace(bundle.config.text_encoder, score_weight=config.text_encoder.score_weight),
        blend=config.blend,
        # That of the blend; a session recommender is trained without.
        llm=config.llm,
    )


def _selection_inputs(model: str, config: Config) -> dict[str, Any]:
    """Values from which a model selects after training, as JSON values."""
    encoder = EmbeddingModel.of(config)
    return {
        "blend": asdict(config.blend),
        **({"text_encoder": asdict(encoder)} if encoder else {}),
        "smoothing": config.tables.knn_smoothing,
        "text_weights": config.text_encoder.score_weight if model == "llm_text" else [],
    }
