"""What a report explains in words: metrics, models, blend, and what was kept of a training."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmgr_rec.evaluation.evaluated import Evaluated
from llmgr_rec.evaluation.intervals import K
from llmgr_rec.evaluation.plots import best_validation
from llmgr_rec.evaluation.results import MODEL_NAMES
from llmgr_rec.storage.bundle_index import STAGES_OF_MODEL

METRIC_MEANINGS = {
    f"HR@{K}": f"hit rate: share of sessions whose next click is among the first {K} items of the list.",
    f"NDCG@{K}": f"like HR@{K}, but a hit at position p counts 1 / log2(p + 1): 1 at the top, 0.63 at position 2, "
    f"0.23 at position {K}.",
    f"MRR@{K}": "mean reciprocal rank: a hit at position p counts 1 / p, a miss 0.",
}
BEYOND_ACCURACY_MEANINGS = {
    "coverage": "share of the catalog that is in at least one list.",
    "novelty": "mean of -log2 of an item's share of the training clicks; more says less popular items.",
    "category_diversity": "1 - mean cosine of the categories of two items of a list; 0 if all are of one category.",
    "text_diversity": "the same for the words of titles.",
    "popularity_bias": "mean training clicks of a listed item, relative to those of the items that were clicked next.",
    "ties": "share of neighboring places of a list with equal scores, whose order is arbitrary.",
}
MODEL_MEANINGS = {
    "popularity": "the items with the most training clicks, the same list for all",
    "item_knn": "items that were clicked in the same sessions as the clicks of this one",
    "session_knn": "items of the most similar training sessions",
    "text_knn": "items whose texts share words with the clicks",
    "sbr": "session encoder over the session graph and the item tables",
    "llm_text": "the session recommender with a language model that reads the titles of the session",
    "llmgr": "language model with the session recommender's vectors as soft tokens",
}
_BLEND_MEANINGS = {
    "item_knn": "item-kNN (items clicked in the same sessions)",
    "text_knn": "text-kNN (items that share words)",
    "embedding_knn": "embedding-kNN (items whose texts a language model encodes alike)",
    "session_knn": "session-kNN (items of similar sessions)",
}


def blend_in_words(evaluated: Evaluated) -> list[str]:
    """What each model's score is made of, a sentence each.

    Args:
        evaluated: The evaluation.
    """
    return [
        _blend(MODEL_NAMES.get(model, model), weights) for model, weights in evaluated.blends.items() if len(weights)
    ]


def _blend(model: str, weights: Mapping[str, float]) -> str:
    used = [
        f"{f'{weight:g} times ' if weight != 1 else ''}that of {_neighbor(name)}"
        for name, weight in weights.items()
        if weight
    ]
    unused = [_neighbor(name) for name, weight in weights.items() if not weight]
    text = f"{model} ranks by its own score"
    if used:
        text += f" plus {' plus '.join(used)}"
    if unused:
        text += f", and does not use {' or '.join(unused)}, because weight 0 was best"
    return f"{text}. The weights were chosen on validation sessions by NDCG@{K}."


def _neighbor(name: str) -> str:
    return _BLEND_MEANINGS.get(name, name)


def chosen_in_words(stage: str, records: Sequence[Mapping[str, Any]], evaluated: Evaluated | None, label: str) -> str:
    """What was kept of a stage's training, and what stands for it in the table.

    Args:
        stage: A stage with validations.
        records: All records of the run.
        evaluated: The evaluation of the run; None without one.
        label: Name of the run where there are several; empty for one.
    """
    lines = [line for line in records if line["stage"] == stage and line.get("split") == "valid"]
    best = best_validation(lines)
    ndcg = f"ndcg@{K}"
    text = f"Epoch {best['epoch']} of {lines[-1]['epoch']} was kept, the best by NDCG@{K} ({best[ndcg]:.4f})."
    selections = [line for line in records if line["stage"] == stage and line.get("split") == "selection"]
    if selections and isinstance(selected := selections[-1].get(ndcg), int | float):
        text += f" The curve is the model alone; with the blend and smoothing selected afterwards it is {selected:.4f}."
    model = next((name for name, stages in STAGES_OF_MODEL.items() if stage in stages), "")
    if evaluated is None or model not in evaluated.models or evaluated.stages.get(model, stage) != stage:
        return f"{text} The table has no row for it."
    metrics = evaluated.models[model]
    where = f", {label}" if label else ""
    return (
        f"{text} In the table it is the row {MODEL_NAMES[model]}{where}: HR@{K} {metrics[f'hr@{K}']:.4f}, NDCG@{K} "
        f"{metrics[ndcg]:.4f} on {evaluated.split} sessions."
    )
