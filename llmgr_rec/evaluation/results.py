"""metrics.json: its format, reading and writing, and the plain-text table."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_write, require_writable

FORMAT = "llmgr_rec.metrics"
# Leaves room for the name of a temporary file beside it, so that no evaluation fails at its end.
_LONGEST_NAME = 150
# Model names and titles in the order of the tables; other names follow.
MODEL_NAMES = {
    "popularity": "Popularity",
    "item_knn": "Item-kNN",
    "session_knn": "Session-kNN",
    "text_knn": "Text-kNN",
    "sbr": "GNN",
    "llm_text": "GNN + LLM on text",
    "llmgr": "LLMGR",
}
METRICS = ("hr", "ndcg", "mrr")
# All metrics at 20, with intervals, by the domain of the session; see `comparison.by_domain`.
BY_DOMAIN = "by_domain"
# Properties of the lists beside their accuracy, and how tables call them.
BEYOND_ACCURACY = "beyond_accuracy"
BEYOND_ACCURACY_NAMES = {
    "coverage": "coverage",
    "novelty": "novelty, bits",
    "category_diversity": "category diversity",
    "text_diversity": "text diversity",
    "popularity_bias": "popularity bias",
    "ties": "ties",
}
CUTOFFS = (5, 10, 20)
# The cutoff of comparisons, intervals and the headline, which every evaluation has.
K = max(CUTOFFS)
# A target rank is stored in a byte.
LARGEST_CUTOFF = 255


def columns(cutoffs: Iterable[int] = CUTOFFS) -> tuple[str, ...]:
    """Names of the metrics at some cutoffs, such as `hr@20`."""
    return tuple(f"{metric}@{k}" for metric in METRICS for k in cutoffs)


COLUMNS = columns()


def check_cutoffs(given: Sequence[int]) -> Sequence[int]:
    """Checks the values of --cutoffs, and returns them.

    Args:
        given: Lengths of lists.

    Raises:
        UserError: A length is out of range.
    """
    if bad := [k for k in given if not 1 <= k <= LARGEST_CUTOFF]:
        raise UserError(f"--cutoffs has {bad[0]}; give lengths of lists from 1 to {LARGEST_CUTOFF}, such as 1,5,10,50")
    return given


def write_metrics(path: Path, content: Mapping[str, Any]) -> None:
    """Writes metrics.json atomically.

    Args:
        path: File to create, or metrics file to replace.
        content: Results by split and model, with a description of the run and the protocol.
    """
    with atomic_write(path) as partial:
        partial.write_text(json.dumps({"format": FORMAT, **content}, indent=2) + "\n", encoding="utf-8")


def read_metrics(path: Path) -> dict[str, Any]:
    """Reads a metrics file.

    Args:
        path: The file.

    Raises:
        UserError: The file is absent or is not a metrics file.
    """
    if not path.is_file():
        raise UserError(f"metrics file {path} does not exist; write it with python -m llmgr_rec.evaluate")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a metrics file; write one with python -m llmgr_rec.evaluate")
    return content


def refuse_foreign_output(path: Path) -> None:
    """Checks that a path is absent or a metrics file, and that its folder is writable.

    Args:
        path: The file to write.

    Raises:
        UserError: The path exists and is not a metrics file, or its folder is not writable.
    """
    require_writable(path.parent)
    if len(path.name.encode()) > _LONGEST_NAME:
        raise UserError(f"--output {path}: the name has more than {_LONGEST_NAME} bytes; give a shorter one")
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; name a file, such as {path / 'metrics.json'}")
    if path.exists():
        try:
            read_metrics(path)
        except UserError:
            raise UserError(f"--output {path} exists and is not a metrics file; give another --output") from None


def in_table_order(models: Mapping[str, Any]) -> list[str]:
    """Names of models, those of `MODEL_NAMES` first and in their order."""
    known = [name for name in MODEL_NAMES if name in models]
    return known + [name for name in models if name not in MODEL_NAMES]


def best_by_column(models: Mapping[str, Mapping[str, float]], shown: Sequence[str] = COLUMNS) -> dict[str, float]:
    """Highest value of each column, rounded to the four decimals of the table."""
    return {column: max(round(metrics[column], 4) for metrics in models.values()) for column in shown}


def blend_notes(blends: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Notes on the blends of the models in a table.

    Args:
        blends: Weight of each nearest-neighbor score by model, from a metrics file.
    """
    return [
        f"{MODEL_NAMES.get(model, model)} with " + ", ".join(f"{name} x {weight:g}" for name, weight in weights.items())
        for model, weights in blends.items()
    ]


def format_table(models: Mapping[str, Mapping[str, Any]], cutoffs: Sequence[int] = CUTOFFS) -> str:
    """A plain-text table with one row per model; a star marks the best value of a column.

    Args:
        models: Metrics by model.
        cutoffs: Cutoffs of the columns.
    """
    shown = columns(cutoffs)
    best = best_by_column(models, shown) if models else {}
    names, width = _row_names(models)
    header = " " * width + "".join(f"{column.upper():>10}" for column in shown)
    lines = [header, "-" * len(header)]
    for name, label in names.items():
        cells = []
        for column in shown:
            value = round(models[name][column], 4)
            mark = "*" if value == best[column] and len(models) > 1 else " "
            cells.append(f"{value:>9.4f}{mark}")
        lines.append(f"{label:<{width}}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def format_domains(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A plain-text table of each domain, with its number of sessions; none for a data set of one log.

    Args:
        models: Metrics by model.
    """
    by_domain = {name: metrics[BY_DOMAIN] for name, metrics in models.items() if BY_DOMAIN in metrics}
    names: Mapping[str, Any] = next(iter(by_domain.values()), {})
    return [
        f"{name}, {found['count']:,} sessions\n"
        + format_table({model: domains[name] for model, domains in by_domain.items()}, (K,))
        for name, found in names.items()
    ]


def format_beyond_accuracy(models: Mapping[str, Mapping[str, Any]]) -> str:
    """A plain-text table of the properties beside accuracy, see `BeyondAccuracy.compute`.

    Args:
        models: Metrics by model.
    """
    names, width = _row_names(models)
    found = [metrics[BEYOND_ACCURACY] for metrics in models.values()]
    shown = [name for name in BEYOND_ACCURACY_NAMES if any(values.get(name) is not None for values in found)]
    header = " " * width + "".join(f"{BEYOND_ACCURACY_NAMES[name].upper():>22}" for name in shown)
    lines = [header, "-" * len(header)]
    for name, label in names.items():
        values = [models[name][BEYOND_ACCURACY].get(key) for key in shown]
        cells = "".join(f"{'' if value is None else f'{value:.4f}':>22}" for value in values)
        lines.append((f"{label:<{width}}" + cells).rstrip())
    return "\n".join(lines)


def _row_names(models: Mapping[str, Any]) -> tuple[dict[str, str], int]:
    """Titles of models in the order of the tables, and the width of their column."""
    names = {name: MODEL_NAMES.get(name, name) for name in in_table_order(models)}
    return names, max([11, *map(len, names.values())]) + 1
