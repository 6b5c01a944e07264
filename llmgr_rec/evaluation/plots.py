"""The plots of a report: from results and training records to charts, each with its figures as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmgr_rec.evaluation.evaluated import Metrics, bucket_names
from llmgr_rec.evaluation.headline import interval, percent, signed
from llmgr_rec.evaluation.intervals import Gain, K, rate_interval
from llmgr_rec.evaluation.metrics import BY_FREQUENCY
from llmgr_rec.evaluation.results import MODEL_NAMES
from llmgr_rec.evaluation.svg import Axis, Chart, text_width

STAGE_TITLES = {
    "sbr": "Session recommender",
    "llm_text": "GNN + LLM on text",
    "align": "Stage 1: alignment",
    "behave": "Stage 2: behavior",
}
# Color class of a stage: that of the model that it trains.
_STAGE_COLORS = {"sbr": "c-sbr", "llm_text": "c-llm_text", "align": "c-other", "behave": "c-llmgr"}
_METRIC_COLORS = {f"hr@{K}": "c-sbr", f"ndcg@{K}": "c-text_knn", f"mrr@{K}": "c-llmgr"}
# Curves with more points are plotted with a running mean over a twentieth of them.
_SMOOTH_ABOVE = 40
# Points of a curve: more are not seen in a chart of 350 pixels, and a long run has hundreds of thousands.
_MAX_POINTS = 300

# Larger gains would hide the small ones in a chart.
_FAR = 1.0
# Buckets of fewer sessions say nothing, and their intervals would fill the chart.
_FEWEST_SESSIONS = 5

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Plot:
    """A chart with its figures.

    Args:
        name: File name of the chart, without a suffix.
        caption: What it shows.
        chart: The chart.
        columns: Titles of the table of its figures.
        rows: Rows of the table.
    """

    name: str
    caption: str
    chart: Chart
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def color_of(model: str) -> str:
    """Color class of a model."""
    return f"c-{model}" if model in MODEL_NAMES else "c-other"


def plot_gains(gains: Mapping[str, Mapping[str, Gain | None]]) -> Plot | None:
    """Gains of the recommender over other models, with their intervals.

    Args:
        gains: Gain by metric and by name of the other model.

    Returns:
        The plot; None without a gain.
    """
    shown = {name: {metric: gain for metric, gain in of.items() if gain} for name, of in gains.items()}
    shown = {name: of for name, of in shown.items() if of}
    if not shown:
        return None
    near = [name for name, of in shown.items() if max(gain.high for gain in of.values()) <= _FAR]
    names = (near or list(shown))[::-1]
    ends = [end for name in names for gain in shown[name].values() for end in (gain.low, gain.high)]
    labels = [name.replace(", ", "\n", 1) for name in names]
    widest = max(text_width(row) for label in labels for row in label.split("\n"))
    metrics = [metric for metric in _METRIC_COLORS if any(metric in of for of in shown.values())]
    chart = Chart(
        title="Gains of the recommender",
        description=f"Relative differences to {', '.join(shown)}, with 95 % intervals; figures in the table below.",
        x=Axis.around([0.0, *ends], percent=True, count=4),
        y=Axis.of_names(labels),
        x_title="gain of the recommender",
        y_title="",
        series=[(metric.upper(), _METRIC_COLORS[metric]) for metric in metrics],
        height=20 + 52 * len(names),
        left=min(20 + int(widest), 160),
        upright=True,
    )
    for row, name in enumerate(names):
        for number, metric in enumerate(metrics):
            if metric not in shown[name]:
                continue
            gain, color = shown[name][metric], _METRIC_COLORS[metric]
            y = row + 0.22 * ((len(metrics) - 1) / 2 - number)
            chart.interval((gain.low, y), (gain.high, y), color)
            chart.point(gain.mean, y, color, f"{metric.upper()} over {name}: {signed(gain)} {interval(gain)}")
    rows = [
        [name, *(f"{signed(of[metric])} {interval(of[metric])}" if metric in of else "" for metric in metrics)]
        for name, of in shown.items()
    ]
    caption = "How much more the recommender has than each other model; an interval that includes 0 may be chance."
    if far := [name for name in shown if name not in names]:
        caption += f" Gains above {100 * _FAR:.0f} % are in the figures only: over {', '.join(far)}."
    return Plot("gains", caption, chart, ["compared with", *(metric.upper() for metric in metrics)], rows)


def plot_buckets(models: Mapping[str, tuple[str, Metrics]], group: str) -> Plot | None:
    """HR@20 by a property of the session or its target, with 95 % intervals and the numbers of sessions.

    Args:
        models: Color class and metrics by name.
        group: `BY_FREQUENCY` or `BY_LENGTH`.

    Returns:
        The plot; None if there are no such results.
    """
    models = {name: of for name, of in models.items() if bucket_names(of[1], group)}
    if not models:
        return None
    first = next(iter(models.values()))[1]
    buckets = bucket_names(first, group)
    counts = [first[group][bucket]["count"] for bucket in buckets]
    what, file = ("training clicks of the target", "popularity")
    if group != BY_FREQUENCY:
        what, file = ("clicks of the session", "length")
    cells = {name: [_cell(of[1], group, bucket) for bucket in buckets] for name, of in models.items()}
    drawn = [place for place, count in enumerate(counts) if count >= _FEWEST_SESSIONS] or list(range(len(counts)))
    highest = max(row[place][1][1] for row in cells.values() for place in drawn)
    chart = Chart(
        title=f"HR@{K} by {what}",
        description="One point for each model, with its 95 % interval; figures in the table below.",
        x=Axis.of_names([f"{buckets[place]}\n{_short(counts[place])}" for place in drawn]),
        y=Axis.around([0.0, highest], percent=True),
        x_title=f"{what}, and number of sessions",
        y_title=f"HR@{K}",
        series=[(name, color) for name, (color, _) in models.items()],
    )
    width = 0.7 / len(models)
    for number, (name, row) in enumerate(cells.items()):
        color = models[name][0]
        for column, place in enumerate(drawn):
            rate, (low, high), count = row[place]
            x = column + (number - (len(models) - 1) / 2) * width
            chart.interval((x, low), (x, high), color)
            tip = f"{name}, {buckets[place]}: {percent(rate)} [{percent(low)} .. {percent(high)}], {count:,} sessions"
            chart.point(x, rate, color, tip)
    rows = [
        [bucket, f"{count:,}", *(_cell_text(row[place]) for row in cells.values())]
        for place, (bucket, count) in enumerate(zip(buckets, counts, strict=True))
    ]
    caption = f"HR@{K} by {what}. Bars are 95 % intervals; they are wide where there are few sessions."
    if len(drawn) < len(counts):
        caption += f" Groups of fewer than {_FEWEST_SESSIONS} sessions are in the figures only."
    return Plot(file, caption, chart, [what, "sessions", *models], rows)


def _cell(metrics: Metrics, group: str, bucket: str) -> tuple[float, tuple[float, float], int]:
    """Hit rate of a bucket, its interval and its number of sessions."""
    cell = metrics[group].get(bucket) or {"hr": 0.0, "count": 0}
    rate, count = float(cell["hr"] or 0.0), int(cell["count"])
    return rate, rate_interval(rate, count), count


def _cell_text(cell: tuple[float, tuple[float, float], int]) -> str:
    rate, (low, high), _ = cell
    return f"{percent(rate)} [{100 * low:.1f} .. {100 * high:.1f}]"


def _short(count: int) -> str:
    """A number of sessions in at most five letters."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if count >= size:
            unit_size = 1000 if unit == "k" else size
            return f"{count / unit_size:.3g}{unit}"
    return f"{count:,}"


def plot_losses(records: Records, suffix: str = "") -> list[Plot]:
    """Training loss by step, one plot for each stage.

    Args:
        records: Lines of metrics.jsonl.
        suffix: Ends the names of the plots.
    """
    stages = by_stage([record for record in records if "split" not in record and "loss" in record])
    return [_plot_loss(stage, lines, suffix) for stage, lines in stages.items()]


def _plot_loss(stage: str, lines: Records, suffix: str) -> Plot:
    title = STAGE_TITLES.get(stage, stage)
    steps = np.array([line["step"] for line in lines], float)
    losses = np.array([line["loss"] for line in lines], float)
    color = _STAGE_COLORS.get(stage, "c-other")
    chart = Chart(
        title=f"Training loss, {title}",
        description=f"From {losses[0]:.3f} at step {steps[0]:,.0f} to {losses[-1]:.3f} at step {steps[-1]:,.0f}.",
        x=Axis.around([0.0, *steps], count=4),
        y=Axis.around(losses.tolist(), count=4),
        x_title="step",
        y_title=f"{title}: training loss",
        height=150,
    )
    if len(steps) > _SMOOTH_ABOVE:
        window = len(steps) // 20
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        chart.line(_thinned(steps, losses), color, "faint")
        chart.line(_thinned(steps[window - 1 :], mean), color)
    else:
        chart.line(_thinned(steps, losses), color)
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 8)).astype(int))
    rows = [[f"{steps[place]:,.0f}", f"{losses[place]:.4f}"] for place in chosen]
    caption = f"{title}: training loss. Losses of different stages cannot be compared."
    return Plot(f"loss-{stage}{suffix}", caption, chart, ["step", "loss"], rows)


def _thinned(xs: np.ndarray, ys: np.ndarray) -> list[tuple[float, float]]:
    chosen = np.unique(np.linspace(0, len(xs) - 1, min(len(xs), _MAX_POINTS)).astype(int))
    return list(zip(xs[chosen].tolist(), ys[chosen].tolist(), strict=True))


def best_validation(lines: Records) -> Mapping[str, Any]:
    """The validation whose weights were kept: the first of those with the highest NDCG@20.

    Args:
        lines: Validation records of a stage, at least one.
    """
    return max(lines, key=lambda line: line[f"ndcg@{K}"])


def plot_validation(stage: str, lines: Records, caption: str, suffix: str = "") -> Plot:
    """HR@20 and NDCG@20 on the validation sessions by epoch, with the epoch that was kept.

    Args:
        stage: The stage.
        lines: Its validation records, at least one.
        caption: What was kept, and what stands beside it in the table.
        suffix: Ends the name of the plot.
    """
    best = best_validation(lines)
    metrics = (f"hr@{K}", f"ndcg@{K}")
    title = STAGE_TITLES.get(stage, stage)
    chart = Chart(
        title=f"Validation, {title}",
        description=f"The best of {len(lines)} validations by NDCG@{K} is that of epoch {best['epoch']}.",
        x=_epochs([line["epoch"] for line in lines]),
        y=Axis.around([0.0, *(line[metric] for line in lines for metric in metrics)], percent=True),
        x_title="epoch of the stage",
        y_title=f"{title}: validation",
        series=[(metric.upper(), _METRIC_COLORS[metric]) for metric in metrics],
        height=150,
    )
    for metric in metrics:
        color = _METRIC_COLORS[metric]
        chart.line([(line["epoch"], line[metric]) for line in lines], color)
        for line in lines:
            chart.point(line["epoch"], line[metric], color, f"epoch {line['epoch']}: {line[metric]:.4f}", 2.5)
    chart.point(best["epoch"], best[metrics[1]], _METRIC_COLORS[metrics[1]], "kept", 6.5, "ring")
    chart.label(best["epoch"], best[metrics[1]], f"epoch {best['epoch']} kept: {best[metrics[1]]:.4f}")
    rows = [[str(line["epoch"]), *(f"{line[metric]:.4f}" for metric in metrics)] for line in lines]
    return Plot(f"validation-{stage}{suffix}", caption, chart, ["epoch", *(m.upper() for m in metrics)], rows)


def _epochs(epochs: Sequence[int]) -> Axis:
    """An axis of whole epochs."""
    last = max(epochs)
    step = max(1, -(-last // 8))
    ticks = list(range(0, last + 1, step))
    return Axis(min(0.0, min(epochs) - 0.5), last + 0.5, ticks, [str(tick) for tick in ticks])


def by_stage(records: Records) -> dict[str, list[Mapping[str, Any]]]:
    """Records by stage, in the order of the stages."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        stages.setdefault(record["stage"], []).append(record)
    known = [stage for stage in STAGE_TITLES if stage in stages]
    return {stage: stages[stage] for stage in [*known, *(other for other in stages if other not in STAGE_TITLES)]}
