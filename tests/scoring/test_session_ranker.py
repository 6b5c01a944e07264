"""What ranking one session costs, counted: most of its time is that of starting operators."""

import sys
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmgr_rec import Recommender
from llmgr_rec.baselines.knn import Popularity
from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.text_index import TextIndex
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.kernels import item_index
from llmgr_rec.modules.prepare_for_inference import fold_weights
from llmgr_rec.storage.bundle import load_bundle
from tests.small_run import small_run

# Measured: 176, without a blend. Another version of torch may need more of them.
MOST_OPERATORS = 210


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


def test_an_index_that_searches_all_lists_ranks_as_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="the extra index is not installed")
    monkeypatch.setattr(item_index, "_MOST_LISTS_SEARCHED", 1)
    run = small_run().run / "export" / "sbr"
    exact, indexed = Recommender.load(run), Recommender.load(run, index=1)
    assert (exact.index_recall, indexed.index_recall) == (None, 1)
    search = indexed.ranker.catalog_ranker._scan
    assert isinstance(search, item_index.ItemIndex)
    search._index.nprobe = search._index.nlist
    ids = exact.item_ids.to_pylist()
    for session in (ids[:1], ids[3:9], [ids[2], ids[2]]):
        for k in (3, len(ids)):
            assert indexed.recommend([session], k).equals(exact.recommend([session], k))
        filtered = [rec.recommend([session], 5, without=ids[:20]) for rec in (exact, indexed)]
        assert filtered[0].equals(filtered[1])


def test_an_index_without_faiss_or_of_no_share_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run().run / "export" / "sbr"
    with pytest.raises(UserError, match=r"^index is 2; give the share of the best items"):
        Recommender.load(run, index=2)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"^an index needs faiss; install it: pip install 'llmgr-rec\[index\]'$"):
        Recommender.load(run, index=0.99)


@pytest.mark.parametrize("score", ["cosine", "dot"])
@torch.no_grad()
def test_queries_from_item_vectors_are_those_of_a_lookup(score: str) -> None:
    ranking = load_bundle(small_run().run / "export" / "sbr").ranking()
    ranking.model.score = score
    clicks = Jagged.from_lengths(torch.tensor([3, 5, 3, 9, 2, 0, 0]), torch.tensor([4, 1, 2]))
    expected = ranking.queries(ranking.collate(RawSessions.to_rank(clicks)))
    fold_weights(ranking.model)
    fast = ranking.with_query_encoder(ranking.ranker(World.alone()))
    assert fast.query_encoder is not None
    found = fast.queries(fast.collate(RawSessions.to_rank(clicks)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
