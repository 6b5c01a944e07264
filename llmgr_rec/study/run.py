"""A whole experiment: every variant with every seed, then one table and its plots."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmgr_rec.baselines.registry import check_baselines
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.process_group import choose_device
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.clicked import ranking_rule
from llmgr_rec.files import atomic_write, require_writable
from llmgr_rec.study.cells import Bench, Cell
from llmgr_rec.study.compare import METRICS, K, hit_rate_by_frequency, relative_gain
from llmgr_rec.study.judge import targets_of
from llmgr_rec.study.recipe import Study, Variant, load_study
from llmgr_rec.study.report import plot_cold, plot_gains, table
from llmgr_rec.study.side_by_side import Task, fill


@dataclass(frozen=True)
class StudyRequest:
    """What the user asks for.

    Args:
        recipe: Shipped experiment or YAML file.
        dataset: Folder made by prepare.
        output: Folder for runs, cells, table and plots.
        seeds: Seeds of every variant that is trained.
        split: Split that is judged.
        jobs: Processes that train and judge side by side.
    """

    recipe: str
    dataset: Path
    output: Path
    seeds: Sequence[int]
    split: str = "test"
    jobs: int = 1

    def file(self, kind: str, part: str = "") -> Path:
        """A file of results: OUTPUT/RECIPE.md and the like, of validation sessions OUTPUT/RECIPE-valid.md."""
        split = "" if self.split == "test" else f"-{self.split}"
        return self.output / f"{Path(self.recipe).stem}{split}{part}.{kind}"


def run_study(request: StudyRequest) -> str:
    """Trains and judges what is missing, and writes OUTPUT/RECIPE.json, .md and two plots; RECIPE-valid of that split.

    Returns:
        The table, Markdown.

    Raises:
        UserError: Anything a user can mend.
    """
    if not request.seeds or min(request.seeds) < 0 or len(set(request.seeds)) < len(request.seeds):
        raise UserError("--seeds takes different numbers from 0, such as 0,1,2")
    if request.jobs < 1:
        raise UserError(f"--jobs is {request.jobs}; give 1 or more")
    require_writable(request.output)
    study, dataset = load_study(request.recipe), Dataset(request.dataset)
    for split in ("valid", request.split):
        if not dataset.manifest.num_sessions[split]:
            raise UserError(f"{dataset.path} has no {split} sessions to judge by; prepare it with another --split")
    _refuse_other_data(request.file("json"), dataset)
    for variant in study.variants:
        if variant.trains:
            choose_device(study.settings_of(variant.points()[0], seed=0).runtime.device)
    catalogue = Catalogue.load(dataset.path)
    check_baselines({variant.model for variant in study.variants}, catalogue)
    bench = Bench(request.output, dataset, request.split)
    chooser = Bench(request.output, dataset, "valid")
    tuned = [variant for variant in study.variants if len(variant.points()) > 1]
    tried = [Task(point, request.seeds[0], tuple(variant.grid)) for variant in tuned for point in variant.points()]
    fill(chooser, study, tried, request.jobs)
    chosen = [choose(chooser, study, variant, request.seeds[0]) for variant in study.variants]
    wanted = [[Task(point, seed) for seed in (request.seeds if point.trains else [0])] for point, _ in chosen]
    fill(bench, study, [task for tasks in wanted for task in tasks], request.jobs)
    cells = {tasks[0].variant.name: [bench.cell(study, task.variant, task.seed) for task in tasks] for tasks in wanted}
    results = compare(study, cells, dataset, catalogue, request.split)
    for point, points in chosen:
        results["variants"][point.name]["grid"] = points
    text = table(study, results)
    _write(request.file("json"), json.dumps(results, indent=2) + "\n")
    _write(request.file("md"), text)
    plot_gains(study, results, request.file("svg", "-gains"))
    plot_cold(results, request.file("svg", "-cold"))
    return text


def choose(bench: Bench, study: Study, variant: Variant, seed: int) -> tuple[Variant, list[dict[str, Any]]]:
    """The point of a variant's grid with the best NDCG@20 on the validation sessions.

    Args:
        bench: Judges validation sessions, so that nothing of the test sessions has a part in the choice.
        study: What is compared.
        variant: With or without a grid; one without is its only point, and nothing is trained to choose it.
        seed: Seed that the grid is tried with.

    Returns:
        The point, without a grid, and every point's settings and NDCG@20, the best first; none without a grid.
    """
    points = variant.points()
    if len(points) == 1:
        return points[0], []
    quality = [bench.cell(study, point, seed).valid_ndcg for point in points]
    order = sorted(range(len(points)), key=lambda number: -quality[number])
    tried = [
        {"settings": {name: points[number].settings[name] for name in variant.grid}, "valid_ndcg@20": quality[number]}
        for number in order
    ]
    return points[order[0]], tried


def compare(
    study: Study, cells: Mapping[str, Sequence[Cell]], dataset: Dataset, catalogue: Catalogue, split: str
) -> dict[str, Any]:
    """All figures of an experiment.

    Args:
        study: What is compared.
        cells: Cells of each variant, one a seed.
        dataset: The sessions.
        catalogue: Their items.
        split: Split that was judged.
    """
    train_count_S = catalogue.train_count_V.numpy()[targets_of(dataset, split)]
    variants = {}
    for name, own in cells.items():
        metrics: dict[str, Any] = {}
        against = study.against(name)
        for metric, measure in METRICS.items():
            values = [measure(cell.places_S) for cell in own]
            means = [float(value_S.mean()) for value_S in values]
            gain = relative_gain(values, [measure(cell.places_S) for cell in cells[against]])
            metrics[metric] = {
                "mean": float(np.mean(means)),
                "sd": _sd(means),
                "seeds": means,
                "gain": asdict(gain) if gain else None,
            }
        variants[name] = {
            **metrics,
            "against": against,
            "hr@20_by_train_count": hit_rate_by_frequency([cell.places_S for cell in own], train_count_S),
            "valid_ndcg@20": float(np.mean([cell.valid_ndcg for cell in own])),
            "blend_weights": [cell.weights_N.tolist() for cell in own],
            "training_minutes": float(np.mean([cell.seconds for cell in own])) / 60,
        }
    return {
        "title": study.title,
        "reference": study.reference,
        "split": split,
        "dataset": {"path": str(dataset.path.resolve()), "sessions_hash": dataset.manifest.sessions_hash},
        "sessions": len(train_count_S),
        "items": catalogue.num_items,
        "chance_hr@20": min(K / catalogue.num_items, 1.0),
        "protocol": dataset.manifest.split,
        "ranking": ranking_rule(dataset),
        "variants": variants,
    }


def _refuse_other_data(file: Path, dataset: Dataset) -> None:
    """A table is only replaced by another of the same data."""
    before = json.loads(file.read_text()).get("dataset") if file.is_file() else None
    if before and before["sessions_hash"] != dataset.manifest.sessions_hash:
        raise UserError(
            f"--output {file.parent} holds {file.stem} of another data set, {before['path']}; give another --output"
        )


def _sd(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _write(file: Path, text: str) -> None:
    with atomic_write(file) as partial:
        partial.write_text(text, encoding="utf-8")
