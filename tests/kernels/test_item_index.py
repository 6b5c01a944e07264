"""The index finds the wanted share of the best items; all that it finds is scored and ordered exactly."""

import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from llmgr_rec.errors import UserError
from llmgr_rec.kernels.item_index import ItemIndex, check_recall
from llmgr_rec.kernels.item_scan import ItemScan

pytest.importorskip("faiss", reason="the extra index is not installed")
NUM_ITEMS, DIM = 8000, 32


def clustered(seed: int, count: int) -> Tensor:
    """Vectors around some directions."""
    centers = torch.randn(80, DIM, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    chosen = centers[torch.randint(80, (count,), generator=generator)]
    return torch.nn.functional.normalize(chosen + 0.15 * torch.randn(count, DIM, generator=generator), dim=1)


def test_finds_nearly_all_of_the_best_items(caplog: pytest.LogCaptureFixture) -> None:
    items, queries = clustered(1, NUM_ITEMS), clustered(2, 60)
    scan = ItemScan(items, 127)
    with caplog.at_level(logging.INFO):
        index = ItemIndex(items, scan, clustered(3, 60), 0.99)
    assert index.is_used
    assert "recall@20" in caplog.text
    assert index.recall >= 0.99
    generator = np.random.default_rng(0)
    found = 0
    for query in queries:
        chosen = generator.permutation(NUM_ITEMS)[:200]
        added = np.sort(chosen), generator.random(200, np.float32)
        exclude = chosen[:30]
        exact, approximate = (search.top_k(query, 20, exclude, added) for search in (scan, index))
        assert not set(approximate[0]) & set(exclude)
        found += len(set(exact[0]) & set(approximate[0]))
        common = dict(zip(*exact, strict=True))
        assert all(common[item] == score for item, score in zip(*approximate, strict=True) if item in common)
        assert (np.diff(approximate[1]) <= 0).all()
        for longer in (600, NUM_ITEMS + 1):
            for ours, theirs in zip(index.top_k(query, longer), scan.top_k(query, longer), strict=True):
                np.testing.assert_array_equal(ours, theirs)
    assert found / (20 * len(queries)) >= 0.99
    is_allowed = generator.random(NUM_ITEMS) < 0.5
    assert is_allowed[index.top_k(queries[0], 20, is_allowed_R=is_allowed)[0]].all()


def test_an_index_that_misses_too_much_is_not_used() -> None:
    items = torch.randn(NUM_ITEMS, 128, generator=torch.Generator().manual_seed(0))
    index = ItemIndex(items, ItemScan(items, 127), torch.randn(20, 128), 0.99)
    assert not index.is_used


@pytest.mark.parametrize("recall", [0, 1.5, True, "0.9", float("nan")])
def test_a_recall_that_is_no_share_is_refused(recall: object) -> None:
    with pytest.raises(UserError, match="; give the share of the best items"):
        check_recall(recall, "index")
