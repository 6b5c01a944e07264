"""Tables of an experiment for papers and further programs: LaTeX and CSV."""

import csv
import io
from collections.abc import Mapping
from typing import Any

from llmgr_rec.experiments.experiment import Experiment

# Below it, an adjusted p-value is marked.
SIGNIFICANCE_LEVEL = 0.05
_COLUMNS = (
    *("variant", "metric", "mean", "low", "high", "sd", "seeds", "against", "gain", "gain_low", "gain_high"),
    *("p", "p_holm", "training_minutes"),
)
_LATEX = {character: f"\\{character}" for character in "&%$#_{}"}
_LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}


def csv_table(results: Mapping[str, Any]) -> str:
    """One line per variant and metric with all figures, unrounded; a figure that does not exist is empty.

    Args:
        results: From `run_experiment.compare`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for name, variant in results["variants"].items():
        for metric in results["metrics"]:
            figures = variant[metric]
            is_compared = variant["against"] != name
            gain = figures["gain"] if is_compared and figures["gain"] else {}
            writer.writerow(
                [
                    name,
                    metric,
                    *(figures[key] for key in ("mean", "low", "high", "sd")),
                    len(figures["seeds"]),
                    variant["against"] if is_compared else None,
                    *(gain.get(key) for key in ("mean", "low", "high")),
                    figures["p"],
                    figures["p_holm"],
                    variant["training_minutes"],
                ]
            )
    return text.getvalue()


def latex_table(experiment: Experiment, results: Mapping[str, Any]) -> str:
    r"""A `table` environment in the style of the package booktabs.

    The best figure of each metric is bold, the second best underlined. A dagger marks a difference to the compared
    variant whose adjusted p-value is below `SIGNIFICANCE_LEVEL`.

    Args:
        experiment: The experiment.
        results: From `run_experiment.compare`.
    """
    metrics, variants = results["metrics"], results["variants"]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escape(_caption(experiment, results))}}}",
        rf"\begin{{tabular}}{{l{'r' * len(metrics)}}}",
        r"\toprule",
        " & ".join(["Variant", *(metric.upper() for metric in metrics)]) + r" \\",
        r"\midrule",
    ]
    best = {
        metric: sorted({round(of[metric]["mean"], 4) for of in variants.values()}, reverse=True) for metric in metrics
    }
    for name, variant in variants.items():
        cells = [_cell(variant[metric], best[metric]) for metric in metrics]
        lines.append(" & ".join([_escape(name), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _caption(experiment: Experiment, results: Mapping[str, Any]) -> str:
    names = results["variants"]
    several = any(variant["against"] != results["reference"] for variant in names.values())
    other = "the variant that each is compared with" if several else results["reference"]
    return (
        f"{experiment.title}. {results['sessions']:,} {results['split']} sessions, {results['items']:,} items, "
        f"full ranking, {results['ranking']}. Half widths of 95 % bootstrap intervals over sessions. Dagger: differs "
        f"from {other} with p < {SIGNIFICANCE_LEVEL} by a paired t-test over sessions with Holm's correction."
    )


def _cell(figures: Mapping[str, Any], best: list[float]) -> str:
    """A mean with the half width of its interval."""
    mean = f"{figures['mean']:.4f}"
    place = best.index(round(figures["mean"], 4))
    text = rf"\textbf{{{mean}}}" if place == 0 else rf"\underline{{{mean}}}" if place == 1 else mean
    mark = r"$^\dagger$" if is_significant(figures) else ""
    return rf"{text}{mark} {{\scriptsize$\pm${(figures['high'] - figures['low']) / 2:.4f}}}"


def is_significant(figures: Mapping[str, Any]) -> bool:
    """Whether a variant differs from the one that it is compared with.

    Args:
        figures: Of a variant and metric, from `run_experiment.compare_metric`.
    """
    return figures["p_holm"] is not None and bool(figures["p_holm"] < SIGNIFICANCE_LEVEL)


def _escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
