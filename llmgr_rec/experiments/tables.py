"""Table and plots of an experiment."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from llmgr_rec.evaluation.metrics import BUCKET_NAMES, BY_FREQUENCY
from llmgr_rec.experiments.experiment import Experiment
from llmgr_rec.experiments.paper_tables import SIGNIFICANCE_LEVEL, is_significant
from llmgr_rec.files import atomic_write

_COLORS = ("#2b6cb0", "#6b9e3f", "#d2552d")
# With a fixed salt, the same results give the same bytes.
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "experiment"}
# Larger gains have a logarithmic axis: relative to an untrained backbone, gains are hundreds of times larger.
_LINEAR_MAX = 2.0
# Width of the linear part of the axis relative to that of a power of ten.
_LINEAR_WIDTH = 3.0
_COLD = BUCKET_NAMES[:3]
_UNSEEN = BUCKET_NAMES[:1]


def table(experiment: Experiment, results: Mapping[str, Any]) -> str:
    """Table of an experiment in Markdown: means and gains with 95 % intervals, and standard deviations over seeds.

    Args:
        experiment: The experiment.
        results: From `run_experiment.compare`.
    """
    reference = results["reference"]
    has_several = _has_several_references(results)
    rare: dict[str, tuple[str, ...]] = {f"{_COLD[0]} to {_COLD[-1].split('-')[1]}": _COLD}
    chance = ""
    if unseen := _count(results["variants"][reference], _UNSEEN):
        rare = {"0": _UNSEEN} | rare
        chance = (
            f" {unseen:,} targets have no training interaction; a list of 20 random items holds a target in "
            f"{results['chance_hr@20']:.4f} of sessions."
        )
    metrics = results["metrics"]
    titles = ["variant", *(metric.upper() for metric in metrics), *(["against"] if has_several else [])]
    titles += [f"gain in {metric.upper()}" for metric in metrics]
    titles += [*(f"HR@20, targets of {bounds} training interactions" for bounds in rare), "training, minutes"]
    lines = [
        f"### {experiment.title}",
        "",
        f"{results['sessions']:,} {results['split']} sessions ({results['protocol'].replace('_', '-')}), "
        f"{results['items']:,} items, full ranking, {results['ranking']}. Means, where there are several seeds ± their "
        f"standard deviation, and gains relative to {'the variant in column against' if has_several else reference}, "
        "with 95 % intervals of a paired bootstrap over sessions. An asterisk marks gains that are significant "
        f"(p < {SIGNIFICANCE_LEVEL}) by a paired t-test over sessions with Holm's correction for the comparisons of "
        f"the column.{chance}",
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
    ]
    for name, variant in results["variants"].items():
        cells = [_mean(variant[metric]) for metric in metrics]
        is_reference = variant["against"] == name
        if has_several:
            cells.append("" if is_reference else variant["against"])
        cells += ["" if is_reference else _gain(variant[metric]) for metric in metrics]
        cells += [_hit_rate(variant, buckets) for buckets in rare.values()]
        lines.append(f"| {' | '.join([name, *cells])} | {variant['training_minutes']:.1f} |")
    return "\n".join([*lines, "", *_selected_points(results)])


def _has_several_references(results: Mapping[str, Any]) -> bool:
    """Whether the gain of a variant is relative to another variant than the reference."""
    return any(variant["against"] != results["reference"] for variant in results["variants"].values())


def _selected_points(results: Mapping[str, Any]) -> list[str]:
    """Lines with the selected point of each grid."""
    lines = []
    for name, variant in results["variants"].items():
        if points := variant["grid"]:
            values = ", ".join(f"{setting} {value}" for setting, value in points[0]["settings"].items())
            lines.append(
                f"- {name}: {values}, best of {len(points)} by NDCG@20 on validation with one seed "
                f"({points[0]['valid_ndcg@20']:.4f}, worst {points[-1]['valid_ndcg@20']:.4f})"
            )
    return [*lines, ""] if lines else []


def _mean(figures: Mapping[str, Any]) -> str:
    spread = "" if figures["sd"] is None else f" ± {figures['sd']:.4f}"
    return f"{figures['mean']:.4f}{spread} [{figures['low']:.4f} .. {figures['high']:.4f}]"


def _gain(figures: Mapping[str, Any]) -> str:
    gain = figures["gain"]
    if gain is None:
        return "none"
    return f"{gain['mean']:+.1%} [{gain['low']:+.1%} .. {gain['high']:+.1%}]{' *' * is_significant(figures)}"


def _hit_rate(variant: Mapping[str, Any], buckets: Sequence[str]) -> str:
    """HR@20 of the targets in several buckets."""
    count = _count(variant, buckets)
    cells = [cell for name, cell in variant[BY_FREQUENCY].items() if name in buckets]
    return f"{sum(cell['hr'] * cell['count'] for cell in cells) / count:.4f}" if count else "none"


def _count(variant: Mapping[str, Any], buckets: Sequence[str]) -> int:
    """Number of targets in several buckets."""
    return int(sum(cell["count"] for name, cell in variant[BY_FREQUENCY].items() if name in buckets))


def plot_gains(experiment: Experiment, results: Mapping[str, Any], file: Path) -> None:
    """Plots the relative gains of all variants with their intervals, at the largest cutoff of each measure.

    Args:
        experiment: The experiment.
        results: From `run_experiment.compare`.
        file: SVG file to write.
    """
    names = [name for name, variant in results["variants"].items() if name != variant["against"]]
    labels = [_label(name, results) for name in names]
    with rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 1.2 + 0.42 * max(len(names), 1)))
        panel = figure.subplots()
        largest = 0.0
        # One metric for each measure: cutoffs ascend.
        plotted = {metric.partition("@")[0]: metric for metric in results["metrics"]}.values()
        for shift, (metric, color) in enumerate(zip(plotted, _COLORS, strict=False)):
            found = [(row, results["variants"][name][metric]["gain"]) for row, name in enumerate(names)]
            gains = [gain for _, gain in found if gain]
            rows = [len(names) - 1 - row + 0.22 * (1 - shift) for row, gain in found if gain]
            means = [gain["mean"] for gain in gains]
            errors: Sequence[Sequence[float]] = [
                [max(gain["mean"] - gain["low"], 0.0) for gain in gains],
                [max(gain["high"] - gain["mean"], 0.0) for gain in gains],
            ]
            panel.errorbar(means, rows, xerr=errors, fmt="o", markersize=4, color=color, label=metric.upper())
            largest = max([largest, *means])
        if largest > _LINEAR_MAX:
            panel.set_xscale("symlog", linthresh=_LINEAR_MAX, linscale=_LINEAR_WIDTH)
        panel.axvline(0, color="#7f8c9a", linewidth=1)
        panel.set_yticks(range(len(names)), labels[::-1])
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
        over = "the variant named below each" if _has_several_references(results) else results["reference"]
        panel.set_xlabel(f"gain over {over}, with its 95 % interval")
        panel.set_title(experiment.title, loc="left", fontsize=10)
        panel.legend(frameon=False, loc="best")
        _save(figure, file)


def _label(name: str, results: Mapping[str, Any]) -> str:
    """Name of a variant and, if there are several references, that of its reference."""
    return f"{name}\nover {results['variants'][name]['against']}" if _has_several_references(results) else name


def plot_cold(results: Mapping[str, Any], file: Path) -> None:
    """Plots HR@20 by training interactions of the target, one line per variant.

    Args:
        results: From `run_experiment.compare`.
        file: SVG file to write.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 4))
        panel = figure.subplots()
        for name, variant in results["variants"].items():
            cells = variant[BY_FREQUENCY]
            known = [bucket for bucket in BUCKET_NAMES if bucket in cells]
            rates = [cells[bucket]["hr"] for bucket in known]
            panel.plot([BUCKET_NAMES.index(bucket) for bucket in known], rates, marker="o", markersize=4, label=name)
        panel.set_xticks(range(len(BUCKET_NAMES)), BUCKET_NAMES)
        panel.set_xlabel("training interactions of the target item")
        panel.set_ylabel("HR@20")
        panel.legend(frameon=False, fontsize=7)
        _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    figure.tight_layout()
    with atomic_write(file) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})
