"""Gathers what a run has to show and writes it: the page, its plots, its table."""

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmgr_rec.config import STAGES
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.examples import Example, choose_examples, ranked_examples, scored_examples
from llmgr_rec.evaluation.html import GENERATOR, ReportContent, render_page
from llmgr_rec.evaluation.plots import STAGE_TITLES, plot_frequency, plot_losses, plot_validation
from llmgr_rec.evaluation.results import COLUMNS, MODEL_NAMES, blend_notes, in_table_order, read_metrics
from llmgr_rec.files import atomic_write, require_writable
from llmgr_rec.storage.bundle_index import answering_bundle, answers_as, bundle_hash, check_trained_on, is_complete

PAGE_NAME = "index.html"
TABLE_NAME = "results.csv"


@dataclass(frozen=True)
class ReportRequest:
    """What the user asks for.

    Args:
        run: Run folder made by train.
        output: Folder to write to.
        metrics: Metrics file; None takes RUN/metrics.json where there is one.
        scores: Output folder of score, for the sessions shown; None ranks a few sessions anew.
        dataset: Folder made by prepare; None takes the one that the metrics name, where it still is.
        sessions: Sessions to show, half of them hits.
        allow_code: Packages that the run's bundle may import its encoder or head from.
    """

    run: Path
    output: Path
    metrics: Path | None = None
    scores: Path | None = None
    dataset: Path | None = None
    sessions: int = 6
    allow_code: Sequence[str] = ()


def write_report(request: ReportRequest) -> Path:
    """Writes page, plots and table.

    Returns:
        The page.

    Raises:
        UserError: The run, or something it is to be shown with, is not there or does not belong to it.
    """
    records = _records(request.run)
    known = _models(request.run)
    metrics = _metrics(request, known)
    dataset = _dataset(request, metrics)
    split = metrics.get("split", "test")
    models: Mapping[str, Any] = metrics.get(split, {})
    _check_output(request.output)
    examples, note = _examples(request, dataset, split, known)
    request.output.mkdir(parents=True, exist_ok=True)
    content = ReportContent(
        title=f"Session recommendation: {request.run.resolve().name}",
        facts=_facts(metrics, models, dataset),
        models=models,
        split=split,
        plots=_plots(records, models, request.output),
        examples=examples,
        examples_note=note,
        settings=_read_text(request.run / "config.yaml"),
    )
    if models:
        _write(request.output / TABLE_NAME, _csv(models))
    _write(request.output / PAGE_NAME, render_page(content))
    return request.output / PAGE_NAME


def _records(run: Path) -> list[dict[str, Any]]:
    """Lines of the run's metrics.jsonl; the last line of a killed run may be cut short."""
    file = run / "metrics.jsonl"
    if not run.is_dir() or not ((run / "config.yaml").is_file() or file.is_file()):
        raise UserError(f"--run {run} is no run folder; give the --output folder of llmgr_rec.train")
    records = []
    for line in _read_text(file).splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"stage", "step"} <= set(record):
            records.append(record)
    return records


def _metrics(request: ReportRequest, known: Collection[str]) -> dict[str, Any]:
    file = request.metrics or request.run / "metrics.json"
    if request.metrics is None and not file.is_file():
        return {}
    metrics = read_metrics(file)
    for model, judged in metrics.get("bundles", {}).items():
        if judged not in known:
            raise UserError(
                f"{file} has figures of {MODEL_NAMES[model]} that are not of a model in {request.run}; "
                "evaluate that run (python -m llmgr_rec.evaluate), or give its own --metrics"
            )
    return metrics


def _models(run: Path) -> set[str]:
    """Hashes of a run's exports."""
    exports = [run / "export" / stage for stage in STAGES]
    return {bundle_hash(export) for export in exports if is_complete(export)}


def _dataset(request: ReportRequest, metrics: Mapping[str, Any]) -> Dataset | None:
    if request.dataset is not None:
        dataset = Dataset(request.dataset)
    else:
        named = metrics.get("dataset_path")
        if not named or not (Path(named) / "manifest.json").is_file():
            if request.scores is not None:
                raise UserError("--scores needs --dataset, which holds the clicks and titles of the sessions scored")
            return None
        dataset = Dataset(Path(named))
    if metrics and metrics["dataset"] != dataset.manifest.catalog_hash:
        raise UserError(
            f"the metrics are of another data set than {dataset.path}; "
            "evaluate again, or give the data set that was evaluated"
        )
    return dataset


def _check_output(output: Path) -> None:
    """Lets through a new or empty folder, or one with an earlier report."""
    require_writable(output)
    if output.is_dir() and any(output.iterdir()) and GENERATOR not in _read_text(output / PAGE_NAME)[:400]:
        raise UserError(f"--output {output} is not empty and holds no report; give another folder")


def _facts(metrics: Mapping[str, Any], models: Mapping[str, Any], dataset: Dataset | None) -> dict[str, str]:
    facts = {}
    if dataset is not None:
        manifest = dataset.manifest
        facts["Data set"] = dataset.path.resolve().name
        facts["Items"] = f"{manifest.num_items:,}"
        facts["Training examples"] = f"{manifest.num_examples['train']:,}"
        facts["Split"] = manifest.split.replace("_", "-")
    if models:
        facts["Judged on"] = f"{metrics['count']:,} {metrics['split']} sessions"
        if rule := metrics.get("protocol"):
            facts["Ranking"] = rule
        if notes := blend_notes(metrics.get("blends", {})):
            facts["Neighbors added"] = "; ".join(notes)
        if stage := metrics.get("stages", {}).get("llmgr"):
            facts["LLMGR after"] = STAGE_TITLES.get(stage, stage)
    return facts


def _plots(records: list[dict[str, Any]], models: Mapping[str, Any], output: Path) -> dict[str, list[tuple[str, Path]]]:
    frequency, losses, validation = (output / f"{name}.png" for name in ("frequency", "losses", "validation"))
    plots: dict[str, list[tuple[str, Path]]] = {"quality": [], "training": []}
    if plot_frequency(models, frequency):
        caption = "HR@20 by how often the item to be found occurs in the training sessions."
        plots["quality"].append((caption, frequency))
    if plot_losses(records, losses):
        caption = "Training loss of each stage. The stages have losses of their own, so heights do not compare."
        plots["training"].append((caption, losses))
    if plot_validation(records, validation):
        plots["training"].append(("The whole catalog ranked for the validation sessions.", validation))
    return plots


def _examples(
    request: ReportRequest, dataset: Dataset | None, split: str, known: Collection[str]
) -> tuple[list[Example], str]:
    """Sessions to show, and what they are."""
    if dataset is None or request.sessions == 0:
        return [], ""
    if request.scores is not None:
        source, model = scored_examples(request.scores, dataset, split, known), "the scored output"
    else:
        bundle = answering_bundle(request.run / "export")
        if bundle is None:
            return [], ""
        check_trained_on(bundle, dataset)
        source, model = ranked_examples(bundle, dataset, split, request.allow_code), MODEL_NAMES[answers_as(bundle)]
    half = -(-request.sessions // 2)
    examples = choose_examples(source, half, request.sessions - half)
    found = sum(example.place > 0 for example in examples)
    note = (
        f"Recommendations of {model} for {split} sessions: the first {found} whose next click was found and the first "
        f"{len(examples) - found} whose next click was not, in the order of the data set."
    )
    return examples, note


def _csv(models: Mapping[str, Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", *COLUMNS, "count"])
    for name in in_table_order(models):
        writer.writerow([name, *(f"{models[name][column]:.6f}" for column in COLUMNS), models[name]["count"]])
    return text.getvalue()


def _read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _write(file: Path, text: str) -> None:
    with atomic_write(file) as partial:
        partial.write_text(text, encoding="utf-8")
