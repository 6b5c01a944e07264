"""Plots of the report, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llmgr_rec.evaluation.metrics import BUCKET_NAMES, BY_FREQUENCY
from llmgr_rec.evaluation.results import MODEL_NAMES, in_table_order
from llmgr_rec.files import atomic_write

STAGE_TITLES = {
    "sbr": "Session recommender",
    "llm_text": "GNN + LLM on text",
    "align": "Stage 1: alignment",
    "behave": "Stage 2: behavior",
}
_COLORS = {
    "popularity": "#b8c0c9",
    "item_knn": "#7f8c9a",
    "session_knn": "#5f6b78",
    "text_knn": "#3f9c95",
    "sbr": "#2b6cb0",
    "llm_text": "#c2902b",
    "llmgr": "#d2552d",
}
_STAGE_COLORS = {"sbr": "#2b6cb0", "llm_text": "#c2902b", "align": "#6b9e3f", "behave": "#d2552d"}
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a94a0",
    "axes.labelcolor": "#3c4650",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "xtick.color": "#3c4650",
    "ytick.color": "#3c4650",
    "legend.frameon": False,
}
_DPI = 160
# Curves with more points are plotted with a running mean over a twentieth of them.
_SMOOTH_ABOVE = 40

Records = Sequence[Mapping[str, Any]]


def plot_losses(records: Records, file: Path) -> bool:
    """Training loss by step, one panel per stage.

    Args:
        records: Lines of metrics.jsonl.
        file: PNG file to write.

    Returns:
        Whether there was anything to plot.
    """
    stages = _by_stage([record for record in records if "split" not in record and "loss" in record])
    if not stages:
        return False
    with rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 2.9))
        axes = figure.subplots(1, len(stages), squeeze=False)
        for panel, (stage, lines) in zip(axes[0], stages.items(), strict=True):
            _draw_curve(panel, lines, _STAGE_COLORS.get(stage, "#2b6cb0"))
            panel.set_title(STAGE_TITLES.get(stage, stage))
            panel.set_xlabel("step")
        axes[0][0].set_ylabel("training loss")
        _save(figure, file)
    return True


def plot_validation(records: Records, file: Path) -> bool:
    """HR@20 and NDCG@20 on the validation sessions by epoch, one line per stage.

    Args:
        records: Lines of metrics.jsonl.
        file: PNG file to write.

    Returns:
        Whether there was anything to plot.
    """
    stages = _by_stage([record for record in records if record.get("split") == "valid"])
    if not stages:
        return False
    with rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 2.9))
        axes = figure.subplots(1, 2)
        for panel, metric in zip(axes, ("hr@20", "ndcg@20"), strict=True):
            for stage, lines in stages.items():
                panel.plot(
                    [line["epoch"] for line in lines],
                    [line[metric] for line in lines],
                    color=_STAGE_COLORS.get(stage),
                    marker="o",
                    markersize=4,
                    label=STAGE_TITLES.get(stage, stage),
                )
            panel.set_title(f"{metric.upper()}, validation")
            panel.set_xlabel("epoch of the stage")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.margins(x=0.08, y=0.15)
        axes[0].legend()
        _save(figure, file)
    return True


def plot_frequency(models: Mapping[str, Mapping[str, Any]], file: Path) -> bool:
    """HR@20 by training interactions of the target, one group of bars per bucket.

    Args:
        models: Metrics by model.
        file: PNG file to write.

    Returns:
        Whether there was anything to plot.
    """
    names = [name for name in in_table_order(models) if BY_FREQUENCY in models[name]]
    if not names:
        return False
    counts = [models[names[0]][BY_FREQUENCY][bucket]["count"] for bucket in BUCKET_NAMES]
    position = np.arange(len(BUCKET_NAMES))
    width = 0.8 / len(names)
    with rc_context({**_STYLE, "axes.grid.axis": "y"}):
        figure = Figure(figsize=(9.6, 3.3))
        panel = figure.subplots()
        for number, name in enumerate(names):
            rates = [models[name][BY_FREQUENCY][bucket]["hr"] or 0.0 for bucket in BUCKET_NAMES]
            shift = (number - (len(names) - 1) / 2) * width
            color = _COLORS.get(name, "#8d6bb0")
            panel.bar(position + shift, rates, width * 0.92, color=color, label=MODEL_NAMES.get(name, name))
        labels = [f"{bucket}\n{count:,} sessions" for bucket, count in zip(BUCKET_NAMES, counts, strict=True)]
        panel.set_xticks(position, labels)
        panel.set_xlabel("training interactions of the target item")
        panel.set_ylabel("HR@20")
        panel.legend(ncols=len(names), loc="upper left")
        panel.margins(y=0.2)
        _save(figure, file)
    return True


def _draw_curve(panel: Axes, lines: Records, color: str) -> None:
    steps = np.array([line["step"] for line in lines])
    losses = np.array([line["loss"] for line in lines])
    if len(steps) <= _SMOOTH_ABOVE:
        panel.plot(steps, losses, color=color, linewidth=1.6)
        return
    window = len(steps) // 20
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    panel.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
    panel.plot(steps[window - 1 :], mean, color=color, linewidth=1.8)


def _by_stage(records: Records) -> dict[str, list[Mapping[str, Any]]]:
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        stages.setdefault(record["stage"], []).append(record)
    known = [stage for stage in STAGE_TITLES if stage in stages]
    return {stage: stages[stage] for stage in [*known, *(other for other in stages if other not in STAGE_TITLES)]}


def _save(figure: Figure, file: Path) -> None:
    figure.tight_layout()
    # Without the software version, the same data give the same bytes.
    with atomic_write(file) as partial:
        figure.savefig(partial, dpi=_DPI, format="png", metadata={"Software": None})
