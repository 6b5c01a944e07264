"""How much work evaluate is: counts that are the same on any machine."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from llmgr_rec.baselines.builders import build_baseline
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.row_groups import RowGroups
from llmgr_rec.evaluation.protocol import evaluate_baseline, evaluate_model
from llmgr_rec.storage.bundle import load_bundle
from tests.function_calls import calls_of
from tests.modules.test_recommender_work import Operators
from tests.small_run import ONE_RANK, small_run

# Measured: 229 calls and 426 operators for the model, at most 99 and 133 for a baseline, with reading and metrics.
# Another version of torch may split some operators.
MOST_OF_A_MODEL, MOST_OF_A_BASELINE = (300, 540), (130, 170)
# Additions and multiplications of matrix products, and elements that copying operators write. Measured: 4,480 and 430.
MOST_OF_A_SESSION = (4900, 480)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups that are read."""
    seen: list[int] = []
    decode = RowGroups._decode

    def see(self: Any, index: int) -> Any:
        seen.append(index)
        return decode(self, index)

    monkeypatch.setattr(RowGroups, "_decode", see)
    return seen


def model(dataset: Dataset) -> Callable[[str], object]:
    """Evaluation of the session recommender with all sessions of a split in one batch."""
    bundle = load_bundle(small_run().run / "export" / "sbr")
    ranking = replace(bundle.ranking(), batch_size=4096)
    return lambda split: evaluate_model(ranking, dataset, split, ONE_RANK, bundle.catalog.train_count_V)


def baseline(name: str) -> Callable[[Dataset], Callable[[str], object]]:
    """Evaluation of a baseline."""

    def build(dataset: Dataset) -> Callable[[str], object]:
        catalog = small_run().catalog
        built = build_baseline(name, dataset, catalog)
        return lambda split: evaluate_baseline(built, dataset, split, catalog, ONE_RANK)

    return build


@pytest.mark.parametrize(
    ("build", "most"),
    [(model, MOST_OF_A_MODEL), *((baseline(name), MOST_OF_A_BASELINE) for name in ("popularity", "item_knn"))],
    ids=["sbr", "popularity", "item_knn"],
)
def test_neither_calls_nor_operators_depend_on_the_sessions(
    build: Any, most: tuple[int, int], decoded: list[int]
) -> None:
    dataset = small_run().dataset
    evaluate = build(dataset)
    work: list[tuple[Counter[str], Counter[str]]] = []
    for split in ("test", "train"):
        evaluate(split)
        decoded.clear()
        with Operators() as operators:
            calls = calls_of(partial(evaluate, split))
        assert len(decoded) == 1, "a split has one row group here, which is read once"
        work.append((calls, operators.calls))
    sessions = dataset.manifest.num_examples
    assert sessions["train"] > 4 * sessions["test"]
    (few, few_operators), (many, many_operators) = work
    assert few.total() <= most[0]
    assert few_operators.total() <= most[1]
    # Prefixes are cut, and scores are ranked in some more blocks.
    assert many.total() <= 1.3 * few.total(), (many - few).most_common(3)
    assert many_operators.total() <= 1.4 * few_operators.total(), (many_operators - few_operators).most_common(3)


def test_without_a_language_model_twice_the_sessions_are_ranked_at_once() -> None:
    bundle = load_bundle(small_run().run / "export" / "sbr")
    assert bundle.evaluation_batch_size == 2 * bundle.config.runtime.eval_batch_size


def test_products_and_copies_of_the_model_grow_with_the_sessions_alone() -> None:
    dataset = small_run().dataset
    evaluate, counts = model(dataset), []
    for split in ("test", "train"):
        evaluate(split)
        with FlopCounterMode(display=False) as products, Operators() as operators:
            evaluate(split)
        counts.append((products.get_total_flops(), operators.copied))
    sessions = dataset.manifest.num_examples["train"] - dataset.manifest.num_examples["test"]
    # What is computed once for all items is left out.
    for few, many, most in zip(*counts, MOST_OF_A_SESSION, strict=True):
        assert 0 < many - few <= most * sessions
