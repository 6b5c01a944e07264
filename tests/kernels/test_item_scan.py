"""The search by bounds equals a stable sort of all scores, whatever the vectors, ties, terms, exclusions and K."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from llmgr_rec.errors import UserError
from llmgr_rec.kernels import item_scan
from llmgr_rec.kernels.item_scan import ItemScan, can_search, exact_scores

Ranked = tuple[NDArray[np.int64], NDArray[np.float32]]


def reference(scores_R: NDArray[np.float32], k: int) -> Ranked:
    """A stable sort of every score; -1 and -inf where no item is left."""
    order = np.argsort(-scores_R, kind="stable")[:k]
    order = order[~np.isneginf(scores_R[order])]
    missing = (0, k - len(order))
    return np.pad(order, missing, constant_values=-1), np.pad(scores_R[order], missing, constant_values=-np.inf)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_equals_a_stable_sort_of_exact_scores(data: st.DataObject) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    num_items, num_columns = data.draw(st.integers(1, 700), "items"), data.draw(st.integers(1, 40), "columns")
    k = data.draw(st.sampled_from([1, 3, 20, 800]), "k")
    items = generator.standard_normal((num_items, num_columns))
    query = generator.standard_normal(num_columns)
    kind = data.draw(st.sampled_from(["normal", "levels", "norms", "one direction", "zeros"]), "kind")
    if kind == "levels":
        items, query = np.round(items), np.round(query)
    elif kind == "norms":
        items *= 10 ** generator.uniform(-9, 9, (num_items, 1))
    elif kind == "one direction":
        # Differences far below the step of int8.
        items = query + 1e-4 * items
    elif kind == "zeros":
        items[generator.random(num_items) < 0.9] = 0
    items, query = items.astype(np.float32), query.astype(np.float32)
    query[0] += not query.any()
    scores = (items.astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
    added = None
    if data.draw(st.booleans(), "added"):
        chosen = np.flatnonzero(generator.random(num_items) < 0.3)
        chosen = generator.permutation(chosen)
        terms = (np.abs(scores).max() * generator.standard_normal(len(chosen))).astype(np.float32)
        added = chosen, terms
        scores[chosen] += terms
    is_allowed = generator.random(num_items) < 0.5 if data.draw(st.booleans(), "filter") else None
    if is_allowed is not None:
        scores[~is_allowed] = -np.inf
    exclude = None
    if data.draw(st.booleans(), "exclude"):
        exclude = generator.integers(-3, num_items + 3, generator.integers(0, num_items + 1))
        scores[exclude[(exclude >= 0) & (exclude < num_items)]] = -np.inf
    search = ItemScan(torch.from_numpy(items), data.draw(st.sampled_from([0, 63, 127]), "largest code of a query"))
    assert can_search(torch.from_numpy(query))
    ids, found = search.top_k(torch.from_numpy(query), k, exclude, added, is_allowed)
    expected_ids, expected_scores = reference(scores, k)
    np.testing.assert_array_equal(found, expected_scores)
    np.testing.assert_array_equal(ids, expected_ids)


def test_scores_few_items_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    items = torch.nn.functional.normalize(torch.randn(50_000, 128, generator=generator), dim=1)
    search, scored = ItemScan(items, 127), []

    def counted(vectors: Tensor, chosen: NDArray[np.int64], *others: Any) -> NDArray[np.float32]:
        scored.append(len(chosen))
        return exact_scores(vectors, chosen, *others)

    with mock.patch.object(item_scan, "exact_scores", counted):
        for query in torch.randn(20, 128, generator=generator):
            search.top_k(query, 20)
    assert max(scored) < 500, scored


def test_what_has_no_bounds_is_left_to_the_plain_product() -> None:
    items = torch.ones(8, 4)
    assert ItemScan.fastest(items) is not None
    assert ItemScan.fastest(items[:0]) is None
    for value in (torch.nan, torch.inf, 1e20):
        damaged = items.clone()
        damaged[3, 1] = value
        assert ItemScan.fastest(damaged) is None
        assert not can_search(damaged[3])
    assert not can_search(torch.zeros(4))


def test_terms_that_are_not_numbers_are_refused() -> None:
    search = ItemScan(torch.ones(200, 4), 127)
    with pytest.raises(UserError, match="not numbers"):
        search.top_k(torch.ones(4), 5, added=(np.array([3]), np.array([np.nan], np.float32)))
