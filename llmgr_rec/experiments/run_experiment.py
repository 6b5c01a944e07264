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
from llmgr_rec.evaluation.metrics import BY_FREQUENCY
from llmgr_rec.evaluation.results import check_cutoffs
from llmgr_rec.experiments.compare import (
    MEASURES,
    K,
    gain_over,
    hit_rate_by_frequency,
    interval,
    resampled_means,
    values_of,
)
from llmgr_rec.experiments.experiment import Experiment, Variant, load_experiment
from llmgr_rec.experiments.paper_tables import csv_table, latex_table
from llmgr_rec.experiments.process_pool import Task, run_trials
from llmgr_rec.experiments.ranks_file import write_target_ranks
from llmgr_rec.experiments.significance import holm, paired_p_value
from llmgr_rec.experiments.tables import plot_cold, plot_gains, table
from llmgr_rec.experiments.target_ranks import TargetRanks, targets_of
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
        metrics: Measures of the tables, some of `compare.MEASURES`.
        cutoffs: Cutoffs of the tables.
    """

    experiment: str
    dataset: Path
    output: Path
    seeds: Sequence[int]
    split: str = "test"
    jobs: int = 1
    metrics: Sequence[str] = tuple(MEASURES)
    cutoffs: Sequence[int] = (K,)

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
    """Runs the missing trials and writes results, tables, target ranks and plots into the output folder.

    Args:
        request: Arguments of the experiment.

    Returns:
        The table in Markdown.

    Raises:
        UserError: An argument, the experiment or the data set is not usable, or a process was killed.
    """
    _check_request(request)
    experiment, dataset = load_experiment(request.experiment), Dataset(request.dataset)
    runner = TrialRunner(request.output, dataset, request.split, max(K, *request.cutoffs))
    _check_experiment(experiment, runner, request)
    jobs = f"{request.jobs} process{'es' * (request.jobs != 1)}"
    print_start("experiments", [request.experiment, request.dataset], request.output, jobs)
    tuned = tune(experiment, TrialRunner(request.output, dataset, "valid"), request)
    trials = _run_variants(experiment, runner, [choice.variant for choice in tuned], request)
    metrics = [f"{measure}@{k}" for measure in request.metrics for k in sorted({*request.cutoffs})]
    results = compare(experiment, trials, runner, metrics)
    for choice in tuned:
        results["variants"][choice.variant.name]["grid"] = choice.points
    return _write_results(experiment, results, trials, request)


def _check_request(request: ExperimentRequest) -> None:
    if not request.seeds or min(request.seeds) < 0 or len(set(request.seeds)) < len(request.seeds):
        raise UserError("--seeds must be distinct numbers from 0 on; give some, such as 0,1,2")
    check_options({"jobs": request.jobs, "seeds": list(request.seeds)}, {"jobs": Bounds(at_least=1, at_most=256)})
    check_cutoffs(request.cutoffs)
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


def compare(
    experiment: Experiment, trials: Mapping[str, Sequence[Trial]], runner: TrialRunner, metrics: Sequence[str]
) -> dict[str, Any]:
    """Metrics of all variants and their gains, as JSON values.

    Args:
        experiment: The experiment.
        trials: Trials by variant name, one per seed.
        runner: Trial runner of the evaluated split.
        metrics: Metrics of the tables, such as `ndcg@10`.
    """
    dataset, catalog = runner.dataset, runner.catalog
    train_count_S = catalog.train_count_V.numpy()[targets_of(dataset, runner.split)]
    against = {name: experiment.against(name) for name in trials}
    variants: dict[str, dict[str, Any]] = {
        name: {
            "against": against[name],
            BY_FREQUENCY: hit_rate_by_frequency([trial.target_ranks_S for trial in of_variant], train_count_S),
            "valid_ndcg@20": float(np.mean([trial.valid_ndcg for trial in of_variant])),
            "selected": [trial.selected for trial in of_variant],
            "training_minutes": float(np.mean([trial.seconds for trial in of_variant])) / 60,
        }
        for name, of_variant in trials.items()
    }
    ranks = {name: [trial.target_ranks_S for trial in of_variant] for name, of_variant in trials.items()}
    for metric in metrics:
        for name, content in compare_metric(metric, ranks, against).items():
            variants[name][metric] = content
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
        "metrics": list(metrics),
        "variants": variants,
    }


def compare_metric(
    metric: str, ranks: Mapping[str, Sequence[TargetRanks]], against: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """A metric of all variants with its interval, and their gains with intervals and p-values, as JSON values.

    Args:
        metric: A measure and a cutoff, such as `ndcg@10`.
        ranks: Target ranks [S] of each seed, by variant name.
        against: The variant that each is compared with; its own name for the reference.

    Returns:
        By variant: `mean`, `low`, `high`, `seeds` (mean of each seed), `sd` over seeds (None for one), `gain` (None if
        the other variant finds nothing), `p` of a paired t-test and `p_holm`, adjusted for all comparisons of the
        metric (None for the reference).
    """
    values = {
        name: np.stack([values_of(metric, ranks_S) for ranks_S in of_variant]) for name, of_variant in ranks.items()
    }
    seed_mean_S = {name: values_NS.mean(axis=0) for name, values_NS in values.items()}
    resampled_R = dict(zip(values, resampled_means(list(seed_mean_S.values())).T, strict=True))
    compared = [name for name in values if against[name] != name]
    p_values = [paired_p_value(seed_mean_S[name], seed_mean_S[against[name]]) for name in compared]
    p_value, adjusted = dict(zip(compared, p_values, strict=True)), dict(zip(compared, holm(p_values), strict=True))
    results: dict[str, dict[str, Any]] = {}
    for name, values_NS in values.items():
        means_N, other = values_NS.mean(axis=1), against[name]
        low, high = interval(resampled_R[name])
        gain = gain_over(
            float(seed_mean_S[name].mean()), float(seed_mean_S[other].mean()), resampled_R[name], resampled_R[other]
        )
        results[name] = {
            "mean": float(means_N.mean()),
            "low": low,
            "high": high,
            "seeds": means_N.tolist(),
            "sd": float(means_N.std(ddof=1)) if len(means_N) > 1 else None,
            "gain": asdict(gain) if gain else None,
            "p": p_value.get(name),
            "p_holm": adjusted.get(name),
        }
    return results


def _write_results(
    experiment: Experiment,
    results: Mapping[str, Any],
    trials: Mapping[str, Sequence[Trial]],
    request: ExperimentRequest,
) -> str:
    """Writes the results, the tables, the target ranks and the plots, and returns the table in Markdown."""
    text = table(experiment, results)
    _write(request.file("json"), json.dumps(results, indent=2) + "\n")
    _write(request.file("md"), text)
    _write(request.file("csv"), csv_table(results))
    _write(request.file("tex"), latex_table(experiment, results))
    seeds = {name: request.seeds if len(of_variant) > 1 else request.seeds[:1] for name, of_variant in trials.items()}
    write_target_ranks(request.file("parquet", "-ranks"), trials, seeds)
    plot_gains(experiment, results, request.file("svg", "-gains"))
    plot_cold(results, request.file("svg", "-cold"))
    return text


def _write(file: Path, text: str) -> None:
    with atomic_write(file) as partial:
        partial.write_text(text, encoding="utf-8")
