"""Exact top-K equals a stable sort of all scores, whatever the ties, blocks, exclusions and K."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.errors import UserError
from llmgr_rec.kernels import topk
from llmgr_rec.kernels.topk import merge_top_k, top_k

Ranked = tuple[NDArray[np.int64], NDArray[np.float32]]


def reference(scores_BV: NDArray[np.float32], k: int, exclude: list[list[int]]) -> Ranked:
    """A stable sort of every score; -1 and -inf where no item is left."""
    scores_BV = scores_BV.copy()
    for row, items in enumerate(exclude):
        scores_BV[row, [item for item in items if 0 <= item < scores_BV.shape[1]]] = -np.inf
    order = np.argsort(-scores_BV, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(scores_BV, order, axis=1)
    order = np.where(np.isneginf(scores), -1, order)
    short = k - order.shape[1]
    if short > 0:
        order = np.pad(order, ((0, 0), (0, short)), constant_values=-1)
        scores = np.pad(scores, ((0, 0), (0, short)), constant_values=-np.inf)
    return order, scores


def jagged(rows: list[list[int]]) -> Jagged:
    values = torch.tensor([value for row in rows for value in row], dtype=torch.int64)
    return Jagged.from_lengths(values, torch.tensor([len(row) for row in rows], dtype=torch.int64))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_equals_a_stable_sort(data: st.DataObject) -> None:
    num_queries = data.draw(st.integers(1, 5), "queries")
    num_items = data.draw(st.integers(1, 90), "items")
    k = data.draw(st.one_of(st.just(1), st.integers(1, 100)), "k")
    levels = data.draw(st.sampled_from([1, 2, 5, 1000]), "distinct values")
    seed = data.draw(st.integers(0, 2**32 - 1), "seed")
    generator = np.random.default_rng(seed)
    # Small whole numbers: products are exact, so ties are ties whatever the order of summation.
    queries = generator.integers(-levels, levels + 1, (num_queries, 2)).astype(np.float32)
    items = generator.integers(-levels, levels + 1, (num_items, 2)).astype(np.float32)
    if data.draw(st.booleans(), "rising"):
        items = np.sort(items, axis=0)
    exclude = [
        generator.integers(-3, num_items + 3, generator.integers(0, num_items + 1)).tolist() for _ in range(num_queries)
    ]
    sizes: dict[str, Any] = {
        "_QUERY_BLOCK": data.draw(st.integers(1, 4)),
        "_CPU_FIRST_BLOCK": data.draw(st.integers(1, 60)),
        "_CPU_ITEM_BLOCK": data.draw(st.integers(8, 40)),
        "_MERGE_EVERY_PLUS": data.draw(st.sampled_from([0, 8])),
        "_MERGE_EVERY": data.draw(st.sampled_from([0.0, 0.5, 10.0])),
        "_STRIPS": data.draw(st.sampled_from([(), (2,), (5, 3)])),
        "_MAX_PER_PLACE": data.draw(st.sampled_from([0, 1, 64])),
        "_FEW_PLACES": data.draw(st.sampled_from([0, 100])),
    }
    use_exclude = data.draw(st.booleans(), "exclude")
    added = generator.integers(-levels, levels + 1, (num_queries, num_items)).astype(np.float32)
    added[generator.random(added.shape) < data.draw(st.sampled_from([0.3, 0.95, 1.0]), "absent")] = 0
    use_added, is_dense = data.draw(st.booleans(), "added"), data.draw(st.booleans(), "dense")
    with mock.patch.multiple(topk, **sizes):
        ids, scores = top_k(
            torch.from_numpy(queries),
            torch.from_numpy(items),
            k,
            jagged(exclude) if use_exclude else None,
            (torch.from_numpy(added) if is_dense else sparse.csr_array(added)) if use_added else None,
        )
    totals = queries @ items.T + added if use_added else queries @ items.T
    expected_ids, expected_scores = reference(totals, k, exclude if use_exclude else [])
    np.testing.assert_array_equal(ids.numpy(), expected_ids)
    np.testing.assert_array_equal(scores.numpy(), expected_scores)


def test_full_sized_blocks_with_real_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(700, 16, generator=generator)
    items = torch.randn(40_000, 16, generator=generator)
    queries[5] = 0.0
    ids, scores = top_k(queries, items, 20)
    all_scores = queries @ items.T
    torch.testing.assert_close(all_scores.gather(1, ids), scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(all_scores.topk(20, dim=1).values, scores, atol=1e-5, rtol=0)
    assert ids[5].tolist() == list(range(20)), "a session without information gets items in order of index"


@given(st.lists(st.tuples(st.floats(width=32, allow_nan=False), st.integers(0, 2**31 - 2)), max_size=20))
@example([(-float(np.finfo(np.float32).smallest_subnormal), 2**31 - 1)])
def test_sort_keys_hold_score_and_item(entries: list[tuple[float, int]]) -> None:
    entries += [(value, 7) for value in (0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, -1.0, -2.0)]
    scores = torch.tensor([score for score, _ in entries], dtype=torch.float32)
    items = torch.tensor([item for _, item in entries])
    keys = topk.sort_keys(scores, items)
    order = np.lexsort((items.numpy(), -scores.numpy()))
    assert (keys.numpy()[order][1:] >= keys.numpy()[order][:-1]).all()
    assert torch.equal(topk.scores_of(keys), scores)
    assert torch.equal(keys & (2**31 - 1), items)


def test_merge_keeps_the_order_of_indices() -> None:
    ids = torch.tensor([[[0, 4]], [[5, 9]], [[12, -1]]])
    scores = torch.tensor([[[2.0, 1.0]], [[2.0, 1.0]], [[3.0, -torch.inf]]])
    merged_ids, merged_scores = merge_top_k(ids, scores, 5)
    assert merged_ids.tolist() == [[12, 0, 5, 4, 9]]
    assert merged_scores.tolist() == [[3, 2, 2, 1, 1]]


@pytest.mark.parametrize("where", ["queries", "items"])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_scores_that_are_not_numbers_are_refused(where: str, k: int) -> None:
    sides: dict[str, Tensor] = {"queries": torch.ones(3, 4), "items": torch.ones(200, 4)}
    sides[where][2, 1] = torch.nan
    with pytest.raises(UserError, match="not numbers"):
        top_k(sides["queries"], sides["items"], k)


def test_no_queries_and_no_items() -> None:
    assert top_k(torch.ones(0, 4), torch.ones(9, 4), 3)[0].shape == (0, 3)
    ids, scores = top_k(torch.ones(2, 4), torch.ones(0, 4), 3)
    assert (ids == -1).all()
    assert scores.isneginf().all()
