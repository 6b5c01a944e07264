"""The report of a run: collects its results and writes the page, plots and table."""

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
from llmgr_rec.evaluation.evaluated import Evaluated
from llmgr_rec.evaluation.examples import Example, choose_examples, ranked_examples, scored_examples
from llmgr_rec.evaluation.exclusion import RankingRule
from llmgr_rec.evaluation.headline import headline
from llmgr_rec.evaluation.html import GENERATOR, ReportContent, render_page
from llmgr_rec.evaluation.plots import STAGE_TITLES, plot_frequency, plot_losses, plot_validation
from llmgr_rec.evaluation.results import COLUMNS, MODEL_NAMES, blend_notes, in_table_order, read_metrics
from llmgr_rec.files import atomic_write, require_writable
from llmgr_rec.storage.bundle_index import bundle_hash, check_trained_on, default_bundle, is_complete, model_of_bundle

PAGE_NAME = "index.html"
TABLE_NAME = "results.csv"
_PLOTS = ("frequency", "losses", "validation")
_OTHER_NAMES = {TABLE_NAME, *(f"{name}.png" for name in _PLOTS)}


@dataclass(frozen=True)
class ReportRequest:
    """Arguments of a report.

    Args:
        run: Run folder written by train.
        output: Folder to write to.
        metrics: Metrics file; None takes RUN/metrics.json if it exists.
        scores: Output folder of score, for the example sessions; None ranks a few sessions with the model.
        dataset: Folder written by prepare; None takes the path in the metrics file if it exists.
        sessions: Number of example sessions, half of them hits.
        allow_code: Packages from which the run's bundle may import its encoder or head.
    """

    run: Path
    output: Path
    metrics: Path | None = None
    scores: Path | None = None
    dataset: Path | None = None
    sessions: int = 6
    allow_code: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Args:
        page: Path of the page.
        headline: The sentence that it opens with.
    """

    page: Path
    headline: str


def write_report(request: ReportRequest) -> Report:
    """Writes the page, the plots and the table.

    Args:
        request: Arguments of the report.

    Raises:
        UserError: The run, metrics, scores or data set is absent, or they do not belong together.
    """
    records = _records(request.run)
    hashes = _bundle_hashes(request.run)
    metrics = _metrics(request, hashes)
    dataset = _dataset(request, metrics)
    split = metrics.get("split", "test")
    models: Mapping[str, Any] = metrics.get(split, {})
    _check_output(request.output)
    examples, note = _examples(request, dataset, split, hashes, _rule(metrics))
    request.output.mkdir(parents=True, exist_ok=True)
    conclusion = _headline(metrics, request.metrics or request.run / "metrics.json")
    content = ReportContent(
        title=f"Session recommendation: {request.run.resolve().name}",
        headline=conclusion,
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
    return Report(request.output / PAGE_NAME, conclusion)


def _headline(metrics: Mapping[str, Any], file: Path) -> str:
    return headline(Evaluated(file, metrics)) if metrics else "The run has not been evaluated."


def _records(run: Path) -> list[dict[str, Any]]:
    """Records of the run's metrics.jsonl, without an incomplete last line of a killed run."""
    file = run / "metrics.jsonl"
    if not run.is_dir() or not ((run / "config.yaml").is_file() or file.is_file()):
        raise UserError(f"--run {run} is not a run folder; give the --output folder of llmgr_rec.train")
    records = []
    for line in _read_text(file).splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"stage", "step"} <= set(record):
            records.append(record)
    return records


def _metrics(request: ReportRequest, bundle_hashes: Collection[str]) -> dict[str, Any]:
    file = request.metrics or request.run / "metrics.json"
    if request.metrics is None and not file.is_file():
        return {}
    metrics = read_metrics(file)
    for model, evaluated in metrics.get("bundles", {}).items():
        if evaluated not in bundle_hashes:
            raise UserError(
                f"{file} has metrics of {MODEL_NAMES[model]} that do not belong to a model in {request.run}; "
                "evaluate that run (python -m llmgr_rec.evaluate), or give its --metrics"
            )
    return metrics


def _bundle_hashes(run: Path) -> set[str]:
    """Hashes of the bundles of a run."""
    exports = [run / "export" / stage for stage in STAGES]
    return {bundle_hash(export) for export in exports if is_complete(export)}


def _rule(metrics: Mapping[str, Any]) -> RankingRule | None:
    """The rule of an evaluation; None without metrics, and for those of version 0.2."""
    return RankingRule(metrics["repeats"], metrics["max_length"]) if "repeats" in metrics else None


def _dataset(request: ReportRequest, metrics: Mapping[str, Any]) -> Dataset | None:
    if request.dataset is not None:
        dataset = Dataset(request.dataset)
    else:
        path = metrics.get("dataset_path")
        if not path or not (Path(path) / "manifest.json").is_file():
            if request.scores is not None:
                raise UserError("--scores requires --dataset, which has the clicks and titles of the scored sessions")
            return None
        dataset = Dataset(Path(path))
    if metrics and metrics["dataset"] != dataset.manifest.catalog_hash:
        raise UserError(
            f"the metrics belong to another data set than {dataset.path}; "
            "evaluate again, or give the data set that was evaluated"
        )
    return dataset


def _check_output(output: Path) -> None:
    """Checks that the folder is absent, empty or contains a report."""
    require_writable(output)
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    # The page is written last, so a report that was interrupted has other files of its own only.
    is_report = names <= _OTHER_NAMES or GENERATOR in _read_text(output / PAGE_NAME)[:400]
    if not is_report:
        raise UserError(f"--output {output} is not empty and contains no report; give another folder")


def _facts(metrics: Mapping[str, Any], models: Mapping[str, Any], dataset: Dataset | None) -> dict[str, str]:
    facts = {}
    if dataset is not None:
        manifest = dataset.manifest
        facts["Data set"] = dataset.path.resolve().name
        facts["Items"] = f"{manifest.num_items:,}"
        facts["Training examples"] = f"{manifest.num_examples['train']:,}"
        facts["Split"] = manifest.split.replace("_", "-")
    if models:
        facts["Evaluated on"] = f"{metrics['count']:,} {metrics['split']} sessions"
        if rule := metrics.get("protocol"):
            facts["Ranking"] = rule
        if notes := blend_notes(metrics.get("blends", {})):
            facts["Blend"] = "; ".join(notes)
        if stage := metrics.get("stages", {}).get("llmgr"):
            facts["LLMGR stage"] = STAGE_TITLES.get(stage, stage)
    return facts


def _plots(records: list[dict[str, Any]], models: Mapping[str, Any], output: Path) -> dict[str, list[tuple[str, Path]]]:
    frequency, losses, validation = (output / f"{name}.png" for name in _PLOTS)
    plots: dict[str, list[tuple[str, Path]]] = {"quality": [], "training": []}
    if plot_frequency(models, frequency):
        caption = "HR@20 by the number of training interactions of the target item."
        plots["quality"].append((caption, frequency))
    if plot_losses(records, losses):
        caption = "Training loss of each stage. The losses differ between stages, so their values cannot be compared."
        plots["training"].append((caption, losses))
    if plot_validation(records, validation):
        caption = "HR@20 and NDCG@20 on the validation sessions, which rank the whole catalog."
        plots["training"].append((caption, validation))
    return plots


def _examples(
    request: ReportRequest,
    dataset: Dataset | None,
    split: str,
    bundle_hashes: Collection[str],
    rule: RankingRule | None,
) -> tuple[list[Example], str]:
    """Example sessions, and the note that describes them."""
    if dataset is None or request.sessions == 0:
        return [], ""
    if request.scores is not None:
        source, model = scored_examples(request.scores, dataset, split, bundle_hashes), "the scored output"
    else:
        bundle = default_bundle(request.run / "export")
        if bundle is None:
            return [], ""
        check_trained_on(bundle, dataset)
        source, model = (
            ranked_examples(bundle, dataset, split, request.allow_code, rule),
            MODEL_NAMES[model_of_bundle(bundle)],
        )
    half = -(-request.sessions // 2)
    examples = choose_examples(source, half, request.sessions - half)
    hits = sum(example.position > 0 for example in examples)
    note = (
        f"Recommendations of {model} for {split} sessions, in the order of the data set: the first {hits} whose next "
        f"click is in the list, and the first {len(examples) - hits} whose next click is not."
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
