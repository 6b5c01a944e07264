"""What ranking one session costs, counted: most of its time is that of starting operators."""

from collections import Counter
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from llmgr_rec import Recommender
from llmgr_rec.baselines.knn import Popularity
from llmgr_rec.data.text_index import TextIndex
from tests.small_run import small_run

# Measured: 395, without a blend. Another version of torch may need more of them.
MOST_OPERATORS = 450


class Counted(TorchDispatchMode):
    """Counts the operators of torch that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_one_session_takes_few_operators_and_prepares_nothing_again() -> None:
    rec = Recommender.load(small_run().run / "export" / "sbr")
    session = rec.item_ids.to_pylist()[:5]
    rec.recommend([session])
    with (
        mock.patch.object(TextIndex, "__init__", side_effect=AssertionError("the catalog was indexed again")),
        mock.patch.object(Popularity, "rank", side_effect=AssertionError("no session is without a known item")),
        Counted() as counted,
    ):
        ranked = rec.recommend([session])
    assert len(ranked["item_ids"][0]) == 10
    assert sum(counted.operators.values()) <= MOST_OPERATORS, counted.operators
