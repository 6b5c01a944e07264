"""Runs an experiment: all variants with all seeds, then the table and the plots."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmgr_rec.baselines.builders import check_baselines
from llmgr_rec.bounds import Bounds, check_options
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.process_group import choose_device
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.exclusion import ranking_rule
from llmgr_rec.experiments.compare import METRICS, K, hit_rate_by_frequency, relative_gain
from llmgr_rec.experiments.experiment import Experiment, Variant, load_experiment
from llmgr_rec.experiments.process_pool import Task, run_trials
from llmgr_rec.experiments.tables import plot_cold, plot_gains, table
from llmgr_rec.experiments.target_ranks import targets_of
from llmgr_rec.experiments.trial import Trial, TrialRunner
from llmgr_rec.files import atomic_write, require_writable
from llmgr_rec.first_and_last_line import print_start


@dataclass(frozen=True)
class ExperimentRequest:
    """Arguments of an experiment.

    Args:
        experiment: Name of a shipped experiment, or a YAML file.
        dataset: Folder written by prepare.
        output: Folder for runs, trials, table and plots.
        seeds: Seeds of each trained variant.
        split: Split to evaluate.
        jobs: Number of processes that run trials in parallel.
    """

    experiment: str
    dataset: Path
    output: Path
    seeds: Sequence[int]
    split: str = "test"
    jobs: int = 1

    def file(self, kind: str, part: str = "") -> Path:
        """Path of a result file, such as OUTPUT/EXPERIMENT.md, or OUTPUT/EXPERIMENT-valid.md for validation sessions.

        Args:
            kind: File name extension.
            part: Suffix of the file name.
        """
        split = "" if self.split == "test" else f"-{self.split}"
        return self.output / f"{Path(self.experiment).stem}{split}{part}.{kind}"


@dataclass(frozen=True)
class Tuned:
    """A variant with the selected point of its grid.

    Args:
        variant: The variant with the settings of that point, without a grid.
        points: Settings and validation NDCG@20 of each point, best first; empty without a grid.
    """

    variant: Variant
    points: list[dict[str, Any]]


def run_experiment(request: ExperimentRequest) -> str:
    """Runs the missing trials and writes OUTPUT/EXPERIMENT.json, .md and two plots.

    Args:
        request: Arguments of the experiment.

    Returns:
        The table in Markdown.

    Raises:
        UserError: An argument, the experiment or the data set is not usable, or a process was killed.
    """
    _check_request(request)
    experiment, dataset = load_experiment(request.experiment), Dataset(request.dataset)
    runner = TrialRunner(request.output, dataset, request.split)
    _check_experiment(experiment, runner, request)
    jobs = f"{request.jobs} process{'es' * (request.jobs != 1)}"
    print_start("experiments", [request.experiment, request.dataset], request.output, jobs)
    tuned = tune(experiment, TrialRunner(request.output, dataset, "valid"), request)
    trials = _run_variants(experiment, runner, [choice.variant for choice in tuned], request)
    results = compare(experiment, trials, runner)
    for choice in tuned:
        results["variants"][choice.variant.name]["grid"] = choice.points
    return _write_results(experiment, results, request)


def _check_request(request: ExperimentRequest) -> None:
    if not request.seeds or min(request.seeds) < 0 or len(set(request.seeds)) < len(request.seeds):
        raise UserError("--seeds must be distinct numbers from 0 on; give some, such as 0,1,2")
    check_options({"jobs": request.jobs, "seeds": list(request.seeds)}, {"jobs": Bounds(at_least=1, at_most=256)})
    require_writable(request.output)


def _check_experiment(experiment: Experiment, runner: TrialRunner, request: ExperimentRequest) -> None:
    """Checks that data set and machine can run the experiment, before anything is trained."""
    dataset = runner.dataset
    for split in ("valid", request.split):
        if not dataset.manifest.num_sessions[split]:
            raise UserError(f"{dataset.path} has no {split} sessions to evaluate; prepare it with another --split")
    _refuse_other_data(request.file("json"), dataset)
    for variant in experiment.variants:
        if variant.trains:
            choose_device(experiment.config_of(variant.points()[0], seed=0).runtime.device)
    check_baselines({variant.model for variant in experiment.variants}, runner.catalog)


def _refuse_other_data(file: Path, dataset: Dataset) -> None:
    """Checks that an existing result file is of the same data set."""
    existing = json.loads(file.read_text()).get("dataset") if file.is_file() else None
    if existing and existing["sessions_hash"] != dataset.manifest.sessions_hash:
        raise UserError(
            f"--output {file.parent} has {file.stem} of another data set, {existing['path']}; give another --output"
        )


def tune(experiment: Experiment, runner: TrialRunner, request: ExperimentRequest) -> list[Tuned]:
    """Selects a point of each variant's grid by NDCG@20 on the validation sessions, with the first seed.

    Args:
        experiment: The experiment.
        runner: Trial runner of the validation split, so that the selection does not use test sessions.
        request: Arguments of the experiment.

    Returns:
        The tuned variants, in the order of the experiment.
    """
    seed = request.seeds[0]
    tasks = [
        Task(point, seed, tuple(variant.grid))
        for variant in experiment.variants
        if len(variant.points()) > 1
        for point in variant.points()
    ]
    run_trials(runner, experiment, tasks, request.jobs)
    return [_select_point(experiment, runner, variant, seed) for variant in experiment.variants]


def _select_point(experiment: Experiment, runner: TrialRunner, variant: Variant, seed: int) -> Tuned:
    points = variant.points()
    if len(points) == 1:
        return Tuned(points[0], [])
    quality = [runner.trial(experiment, point, seed).valid_ndcg for point in points]
    order = sorted(range(len(points)), key=lambda number: -quality[number])
    points_by_quality = [
        {"settings": {name: points[number].settings[name] for name in variant.grid}, "valid_ndcg@20": quality[number]}
        for number in order
    ]
    return Tuned(points[order[0]], points_by_quality)


def _run_variants(
    experiment: Experiment, runner: TrialRunner, variants: Sequence[Variant], request: ExperimentRequest
) -> dict[str, list[Trial]]:
    """Trials by variant name, one per seed; a baseline has one."""
    tasks = [Task(variant, seed) for variant in variants for seed in (request.seeds if variant.trains else [0])]
    run_trials(runner, experiment, tasks, request.jobs)
    trials: dict[str, list[Trial]] = {variant.name: [] for variant in variants}
    for task in tasks:
        trials[task.variant.name].append(runner.trial(experiment, task.variant, task.seed))
    return trials


def compare(experiment: Experiment, trials: Mapping[str, Sequence[Trial]], runner: TrialRunner) -> dict[str, Any]:
    """Metrics of all variants and their gains, as JSON values.

    Args:
        experiment: The experiment.
        trials: Trials by variant name, one per seed.
        runner: Trial runner of the evaluated split.
    """
    dataset, catalog = runner.dataset, runner.catalog
    train_count_S = catalog.train_count_V.numpy()[targets_of(dataset, runner.split)]
    variants = {
        name: _variant_metrics(of_variant, trials[experiment.against(name)], train_count_S)
        | {"against": experiment.against(name)}
        for name, of_variant in trials.items()
    }
    return {
        "title": experiment.title,
        "reference": experiment.reference,
        "split": runner.split,
        "dataset": {"path": str(dataset.path.resolve()), "sessions_hash": dataset.manifest.sessions_hash},
        "sessions": len(train_count_S),
        "items": catalog.num_items,
        "chance_hr@20": min(K / catalog.num_items, 1.0),
        "protocol": dataset.manifest.split,
        "ranking": str(ranking_rule(dataset.manifest)),
        "variants": variants,
    }


def _variant_metrics(trials: Sequence[Trial], reference: Sequence[Trial], train_count_S: np.ndarray) -> dict[str, Any]:
    """Metrics of one variant and their gains over its reference."""
    results: dict[str, Any] = {}
    for metric, measure in METRICS.items():
        values = [measure(trial.target_ranks_S) for trial in trials]
        means = [float(value_S.mean()) for value_S in values]
        gain = relative_gain(values, [measure(trial.target_ranks_S) for trial in reference])
        results[metric] = {
            "mean": float(np.mean(means)),
            "sd": float(np.std(means, ddof=1)) if len(means) > 1 else 0.0,
            "seeds": means,
            "gain": asdict(gain) if gain else None,
        }
    return results | {
        "hr@20_by_train_count": hit_rate_by_frequency([trial.target_ranks_S for trial in trials], train_count_S),
        "valid_ndcg@20": float(np.mean([trial.valid_ndcg for trial in trials])),
        "selected": [trial.selected for trial in trials],
        "training_minutes": float(np.mean([trial.seconds for trial in trials])) / 60,
    }


def _write_results(experiment: Experiment, results: Mapping[str, Any], request: ExperimentRequest) -> str:
    """Writes the results, the table and the plots, and returns the table."""
    text = table(experiment, results)
    _write(request.file("json"), json.dumps(results, indent=2) + "\n")
    _write(request.file("md"), text)
    plot_gains(experiment, results, request.file("svg", "-gains"))
    plot_cold(results, request.file("svg", "-cold"))
    return text


def _write(file: Path, text: str) -> None:
    with atomic_write(file) as partial:
        partial.write_text(text, encoding="utf-8")
