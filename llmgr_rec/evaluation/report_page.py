"""The report of one run or several: collects their results and writes the page, plots and table."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmgr_rec.data.dataset import Dataset
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.comparison_rows import Row, check_comparable, common_cutoffs, notes_on, rows_of
from llmgr_rec.evaluation.evaluated import Evaluated
from llmgr_rec.evaluation.examples import Example, choose_examples, ranked_examples, scored_examples
from llmgr_rec.evaluation.explanations import blend_in_words, chosen_in_words
from llmgr_rec.evaluation.headline import compared_alone, headline, in_sentence, interval, signed
from llmgr_rec.evaluation.html import ReportContent, render_page
from llmgr_rec.evaluation.intervals import K
from llmgr_rec.evaluation.metrics import BY_FREQUENCY, BY_LENGTH
from llmgr_rec.evaluation.page_shell import GENERATOR, chart_style
from llmgr_rec.evaluation.plots import (
    Plot,
    by_stage,
    color_of,
    plot_buckets,
    plot_gains,
    plot_losses,
    plot_validation,
)
from llmgr_rec.evaluation.reported_run import ReportedRun, labels_of
from llmgr_rec.evaluation.results import BEYOND_ACCURACY, BEYOND_ACCURACY_NAMES, MODEL_NAMES, columns
from llmgr_rec.files import atomic_write, require_writable
from llmgr_rec.first_and_last_line import print_start
from llmgr_rec.remote_path import as_path
from llmgr_rec.storage.bundle_index import check_trained_on, default_bundle, model_of_bundle

PAGE_NAME = "index.html"
TABLE_NAME = "results.csv"
# Names of plots, of version 0.2 included.
_PLOT_NAMES = re.compile(
    r"(gains|popularity|length|(loss|validation)-[a-z_]+(-\d+)?)\.svg|(frequency|losses|validation)\.png"
)


@dataclass(frozen=True)
class ReportRequest:
    """Arguments of a report.

    Args:
        runs: Run folders written by train; the first one is compared with the others.
        output: Folder to write to.
        metrics: Metrics file of each run; empty takes RUN/metrics.json where it exists.
        scores: Output folder of score for the first run, for the example sessions; None ranks sessions with the model.
        dataset: Folder written by prepare; None takes the path in the metrics file if it exists.
        sessions: Number of example sessions, half of them hits.
        allow_code: Packages from which the run's bundle may import its encoder or head.
    """

    runs: Sequence[Path]
    output: Path
    metrics: Sequence[Path] = ()
    scores: Path | None = None
    dataset: Path | None = None
    sessions: int = 24
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
        UserError: A run, metrics, scores or the data set is absent, or they do not belong together.
    """
    runs = _read_runs(request)
    check_comparable(runs)
    first = runs[0].evaluated
    dataset = _dataset(request, first)
    _check_output(request.output)
    reads = [*request.runs, *(request.metrics or []), request.scores, dataset and dataset.path]
    print_start("report", reads, request.output)
    examples, note = _examples(request, runs[0], dataset)
    rows = rows_of(runs)
    content = ReportContent(
        name=", ".join(run.label for run in runs),
        headline=headline(first) if first else "The run has not been evaluated.",
        further=_further(rows, first),
        facts=_facts(runs, dataset),
        runs=[run.label for run in runs],
        rows=rows,
        notes=_notes(runs, rows),
        quality=_quality_plots(rows),
        training=_training_plots(runs),
        examples=examples,
        examples_note=note,
        settings={run.label: run.settings for run in runs},
    )
    _write_files(request.output, content)
    return Report(request.output / PAGE_NAME, content.headline)


def _read_runs(request: ReportRequest) -> list[ReportedRun]:
    if request.metrics and len(request.metrics) != len(request.runs):
        raise UserError(
            f"--metrics is given {len(request.metrics)} times for {len(request.runs)} runs; give one for each --run, "
            "in the same order, or none"
        )
    if len(set(labels_of(request.runs))) < len(request.runs):
        raise UserError("--run names the same folder twice; give each run once")
    files: Sequence[Path | None] = request.metrics or [None] * len(request.runs)
    runs = [
        ReportedRun.read(run, label, metrics)
        for run, label, metrics in zip(request.runs, labels_of(request.runs), files, strict=True)
    ]
    missing = [run for run in runs if run.evaluated is None]
    if missing and len(runs) > 1:
        raise UserError(
            f"{missing[0].path} has no metrics.json to compare; evaluate it with --output "
            f"{missing[0].path / 'metrics.json'}, or give --metrics for each run"
        )
    return runs


def _further(rows: Sequence[Row], first: Evaluated | None) -> list[str]:
    """Conclusions after the first: a difference in the order of the lists, and the comparison with other runs."""
    sentences = []
    baseline = first.strongest_baseline if first else None
    for row in rows:
        gain, order = row.gains.get(f"hr@{K}"), row.gains.get(f"ndcg@{K}")
        is_same = gain is not None and gain.low <= 0 <= gain.high
        if not row.run and row.model == baseline and is_same and order and (order.low > 0 or order.high < 0):
            place = "higher" if order.mean > 0 else "lower"
            sentences.append(
                f"It ranks the next click {place} than {in_sentence(row.model)}: NDCG@{K} {signed(order)} "
                f"{interval(order)}."
            )
        if row.run and row.is_result and row.evaluated is not first and row.gains:
            rate = row.evaluated.hit_rate(row.model)
            sentences.append(compared_alone(gain, f"the recommender of {row.run}", rate))
    return sentences


def _dataset(request: ReportRequest, evaluated: Evaluated | None) -> Dataset | None:
    if request.dataset is not None:
        dataset = Dataset(request.dataset)
    else:
        path = evaluated.content.get("dataset_path") if evaluated else None
        if not path or not (as_path(path) / "manifest.json").is_file():
            if request.scores is not None:
                raise UserError("--scores requires --dataset, which has the clicks and titles of the scored sessions")
            return None
        dataset = Dataset(as_path(path))
    if evaluated and evaluated.content.get("dataset") != dataset.manifest.catalog_hash:
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
    is_report = all(name == TABLE_NAME or _PLOT_NAMES.fullmatch(name) for name in names)
    if not is_report and GENERATOR not in _beginning(output / PAGE_NAME):
        raise UserError(f"--output {output} is not empty and contains no report; give another folder")


def _beginning(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open(encoding="utf-8", errors="replace") as stream:
        return stream.read(400)


def _facts(runs: Sequence[ReportedRun], dataset: Dataset | None) -> dict[str, list[str]]:
    """Facts by name, a value for each run."""
    facts: dict[str, list[str]] = {}
    for number, run in enumerate(runs):
        for name, value in {**_data_facts(run.evaluated, dataset), **run.facts()}.items():
            facts.setdefault(name, [""] * len(runs))[number] = value
    order = ["Recipe", "Data", "Evaluated on", "Lists"]
    return {name: facts[name] for name in [*order, *facts] if name in facts}


def _data_facts(evaluated: Evaluated | None, dataset: Dataset | None) -> dict[str, str]:
    facts = {}
    if dataset is not None:
        manifest = dataset.manifest
        facts["Data"] = (
            f"{dataset.path.resolve().name}: {manifest.num_items:,} items, {manifest.num_sessions['train']:,} training "
            f"sessions with {manifest.num_examples['train']:,} examples, {manifest.split.replace('_', '-')} split"
        )
    if evaluated is not None:
        facts["Evaluated on"] = f"{evaluated.count:,} {evaluated.split} sessions, {evaluated.num_items:,} items"
        protocol = str(evaluated.content.get("protocol", ""))
        if evaluated.rule is not None:
            shown = f"sessions show their newest {evaluated.rule.max_length} clicks"
            protocol = f"{protocol}; {shown}" if protocol else shown
        if protocol:
            facts["Lists"] = protocol
    return facts


def _notes(runs: Sequence[ReportedRun], rows: Sequence[Row]) -> list[str]:
    notes = notes_on(rows)
    if any(gain for row in rows for gain in row.gains.values()) and all(row.is_paired for row in rows):
        notes.append("Intervals of gains are those of a paired bootstrap over sessions.")
    for run in runs:
        if run.evaluated:
            whose = f"{run.label}: " if len(runs) > 1 else ""
            notes += [f"{whose}{sentence}" for sentence in blend_in_words(run.evaluated)]
    return notes


def _quality_plots(rows: Sequence[Row]) -> list[Plot]:
    models = {row.label: (_color(row, rows), row.metrics) for row in rows}
    plots = [
        plot_gains({row.label: row.gains for row in rows}),
        plot_buckets(models, BY_FREQUENCY),
        plot_buckets(models, BY_LENGTH),
    ]
    return [plot for plot in plots if plot]


def _color(row: Row, rows: Sequence[Row]) -> str:
    """Color class of a row; of several runs, the same model has another color in the second run."""
    return color_of(row.model) if row is next(other for other in rows if other.model == row.model) else "c-other"


def _training_plots(runs: Sequence[ReportedRun]) -> dict[str, list[Plot]]:
    plots = {}
    for number, run in enumerate(runs, start=1):
        several = len(runs) > 1
        suffix = f"-{number}" if several else ""
        valid = by_stage([record for record in run.records if record.get("split") == "valid"])
        plots[run.label] = [
            plot_validation(
                stage, lines, chosen_in_words(stage, run.records, run.evaluated, run.label if several else ""), suffix
            )
            for stage, lines in valid.items()
        ]
        plots[run.label] += plot_losses(run.records, suffix)
    return plots


def _examples(request: ReportRequest, run: ReportedRun, dataset: Dataset | None) -> tuple[list[Example], str]:
    """Example sessions, and the note that describes them."""
    if dataset is None or request.sessions == 0:
        return [], ""
    split = run.evaluated.split if run.evaluated else "test"
    rule = run.evaluated.rule if run.evaluated else None
    if request.scores is not None:
        source, model = scored_examples(request.scores, dataset, split, run.bundle_hashes), "the scored output"
    else:
        bundle = default_bundle(run.path / "export")
        if bundle is None:
            return [], ""
        check_trained_on(bundle, dataset)
        source = ranked_examples(bundle, dataset, split, request.allow_code, rule)
        model = MODEL_NAMES[model_of_bundle(bundle)]
    half = -(-request.sessions // 2)
    examples = choose_examples(source, half, request.sessions - half)
    hits = sum(example.position > 0 for example in examples)
    whose = f" of {run.label}" if len(request.runs) > 1 else ""
    note = (
        f"Recommendations of {model}{whose} for {split} sessions, in the order of the data set: the first {hits} whose "
        f"next click is in the list, and the first {len(examples) - hits} whose next click is not."
    )
    return examples, note


def _write_files(output: Path, content: ReportContent) -> None:
    """Writes plots and table, then the page, and removes plots of an earlier report."""
    output.mkdir(parents=True, exist_ok=True)
    plots = [*content.quality, *(plot for of_run in content.training.values() for plot in of_run)]
    files = {f"{plot.name}.svg": plot.chart.render(chart_style()) + "\n" for plot in plots}
    if content.rows:
        files[TABLE_NAME] = _csv(content.rows, len(content.runs) > 1)
    for name, text in files.items():
        _write(output / name, text)
    _write(output / PAGE_NAME, render_page(content))
    for path in output.iterdir():
        if path.name not in files and (path.name == TABLE_NAME or _PLOT_NAMES.fullmatch(path.name)):
            path.unlink()


def _csv(rows: Sequence[Row], several: bool) -> str:
    text, shown = io.StringIO(), columns(common_cutoffs(rows))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(["run"] if several else []), "model", *shown, *BEYOND_ACCURACY_NAMES, "count"])
    for row in rows:
        beyond = row.metrics.get(BEYOND_ACCURACY, {})
        numbers = [*(row.metrics[column] for column in shown), *map(beyond.get, BEYOND_ACCURACY_NAMES)]
        values = ["" if number is None else f"{number:.6f}" for number in numbers]
        writer.writerow([*([row.run] if several else []), row.model, *values, row.metrics["count"]])
    return text.getvalue()


def _write(file: Path, text: str) -> None:
    with atomic_write(file) as partial:
        partial.write_text(text, encoding="utf-8")
