"""The conclusion in words, whichever way the comparison went."""

from pathlib import Path

import pytest

from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.evaluated import Evaluated
from llmgr_rec.evaluation.headline import headline
from llmgr_rec.evaluation.metrics import BUCKET_NAMES, BY_FREQUENCY
from llmgr_rec.evaluation.results import COLUMNS


def metrics(rate: float, count: int = 1000) -> dict:
    buckets = {name: {"hr": rate, "count": count // 5} for name in BUCKET_NAMES}
    return {**dict.fromkeys(COLUMNS, rate), "count": count, BY_FREQUENCY: buckets}


def said(gain: tuple[float, float, float] | None, rate: float = 0.144, items: int = 5000, **changes) -> str:
    models = {"sbr": metrics(rate), "item_knn": metrics(0.089), "popularity": metrics(0.02)}
    values = dict(zip(("mean", "low", "high"), gain, strict=True)) if gain else None
    content = {
        "test": models,
        "count": 1000,
        "num_items": items,
        "split": "test",
        "stages": {"sbr": "sbr"},
        "gains": {"sbr": {name: {"hr@20": values} for name in ("item_knn", "popularity")}},
        **changes,
    }
    return headline(Evaluated(Path("metrics.json"), content))


@pytest.mark.parametrize(
    ("gain", "ending"),
    [
        ((0.62, 0.40, 0.85), ", 62 % more often than item-kNN [40 .. 85]."),
        ((0.052, 0.011, 0.1), ", 5.2 % more often than item-kNN [1.1 .. 10.0]."),
        ((0.0031, 0.0011, 0.0051), ", 0.31 % more often than item-kNN [0.11 .. 0.51]."),
        ((4.2, 3.1, 5.96), ", 5.2 times as often as item-kNN [4.1 .. 7.0]."),
        ((-0.21, -0.3, -0.1), ", 21 % less often than item-kNN [10 .. 30]."),
        (
            (0.02, -0.05, 0.09),
            ", which is not distinguishable from item-kNN (8.9 %; difference +2.0 % [-5.0 .. 9.0]).",
        ),
        (None, "; item-kNN finds it in 8.9 %, which are too few hits to compare."),
    ],
)
def test_the_comparison_is_in_words(gain, ending):
    assert said(gain) == f"The recommender finds the next click among 20 in 14.4 % of sessions{ending}"


def test_a_hit_rate_of_chance_is_called_so():
    assert said(None, rate=0.016, items=1000) == (
        "The recommender finds the next click among 20 in 1.6 % of sessions, which is not distinguishable from a "
        "random list (2.0 %)."
    )
    assert "random list (100.0 %)" in said(None, rate=1.0, items=7)


def test_without_a_model_or_a_baseline_or_sessions_it_says_so():
    assert "no baseline was evaluated" in said(None, test={"sbr": metrics(0.2)}, gains={"sbr": {}})
    assert said(None, test={"item_knn": metrics(0.1)}, stages={}, gains={}).startswith("Only baselines were evaluated")
    assert said(None, count=0) == "There are no test sessions to evaluate on."


def test_files_of_version_0_2_have_an_interval_that_is_not_paired():
    content = {"test": {"llmgr": metrics(0.3), "item_knn": metrics(0.2)}, "count": 1000, "num_items": 5000}
    evaluated = Evaluated(Path("metrics.json"), content)
    assert headline(evaluated).endswith(", 50 % more often than item-kNN [28 .. 75].")
    assert not evaluated.is_paired


@pytest.mark.parametrize(
    "changes",
    [
        {"test": {"sbr": {"hr@20": 0.5}}},
        {"test": {"sbr": metrics(3.0)}},
        {"test": []},
        {"count": None},
        {"gains": {"sbr": {"item_knn": {"hr@20": {"mean": 0.1}}}}},
        {"gains": {}},
        {"stages": 5},
    ],
)
def test_a_damaged_file_is_one_line(changes):
    with pytest.raises(UserError, match=r"metrics\.json is damaged \(.*\); evaluate again with --output metrics\.json"):
        said((0.1, 0.05, 0.15), **changes)
