"""Bounds by integers find the lists of a stable sort, whatever the vectors, ties, terms, exclusions and block sizes."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from torch import Tensor

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.errors import UserError
from llmgr_rec.kernels import batch_scan
from llmgr_rec.kernels.batch_scan import BatchScan
from llmgr_rec.kernels.item_scan import ItemScan
from llmgr_rec.kernels.score_terms import TermRows
from tests.kernels.test_item_scan import reference


def vectors(generator: np.random.Generator, kind: str, num_items: int, num_queries: int) -> tuple[Tensor, Tensor]:
    num_columns = int(generator.integers(2, 40))
    items = generator.standard_normal((num_items, num_columns))
    queries = generator.standard_normal((num_queries, num_columns))
    if kind == "levels":
        items, queries = np.round(items), np.round(queries)
    elif kind == "norms":
        items *= 10 ** generator.uniform(-9, 9, (num_items, 1))
        queries *= 10 ** generator.uniform(-9, 9, (num_queries, 1))
    elif kind == "one direction":
        # Differences far below the step of int8.
        items = queries[:1] + 1e-4 * items
    elif kind == "zeros":
        items[generator.random(num_items) < 0.9] = 0
    queries[:, 0] += ~queries.any(axis=1)
    return torch.from_numpy(items).float(), torch.from_numpy(queries).float()


def random_terms(generator: np.random.Generator, scores_BR: np.ndarray) -> TermRows:
    """Up to four rows a query, of terms up to its largest score."""
    rows_B = generator.integers(0, 5, len(scores_BR))
    shape = (int(rows_B.sum()), scores_BR.shape[1])
    terms_LR = generator.random(shape, np.float32) * (generator.random(shape) < 0.2)
    terms_LR *= np.repeat(np.abs(scores_BR).max(axis=1), rows_B)[:, None]
    return TermRows(sparse.csr_array(terms_LR), np.concatenate([[0], rows_B.cumsum()]))


def exact(items: Tensor, queries: Tensor, added: TermRows | None) -> np.ndarray:
    scores = (queries.double().numpy() @ items.double().numpy().T).astype(np.float32)
    if added is not None:
        for query, score in enumerate(scores):
            terms = np.zeros(len(score), np.float32)
            for row in range(added.offsets_B1[query], added.offsets_B1[query + 1]):
                terms += added.rows_LR[[row]].toarray()[0]
            score += terms
    return scores


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_equals_a_stable_sort_of_exact_scores(data: st.DataObject) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    num_items, num_queries = data.draw(st.integers(64, 500), "items"), data.draw(st.integers(1, 9), "queries")
    kind = data.draw(st.sampled_from(["normal", "levels", "norms", "one direction", "zeros"]), "kind")
    k = data.draw(st.sampled_from([1, 3, 16]), "k")
    items, queries = vectors(generator, kind, num_items, num_queries)
    added, exclude = None, None
    scores = exact(items, queries, added)
    if data.draw(st.booleans(), "added"):
        added = random_terms(generator, scores)
        scores = exact(items, queries, added)
    if data.draw(st.booleans(), "exclude"):
        lengths = torch.from_numpy(generator.integers(0, num_items + 1, num_queries))
        values = torch.from_numpy(generator.integers(-3, num_items + 3, int(lengths.sum())))
        exclude = Jagged.from_lengths(values, lengths)
        for query, score in enumerate(scores):
            row = exclude.row(query)
            score[row[(row >= 0) & (row < num_items)]] = -np.inf
    sizes = {
        "_STRIP": 2,
        "_ITEM_BLOCK": 128,
        "_QUERY_BLOCK": 4,
        "_SEARCHED_QUERIES": 3,
        "_SCORED_QUERIES": 3,
        "_MOST_PLUS": 10**6,
    }
    with mock.patch.multiple(batch_scan, **sizes):
        scan = BatchScan(items)
        assert scan.can_rank(k)
        ranked = scan.top_k(queries, k, exclude, added)
    assert ranked is not None
    expected = [reference(score, k) for score in scores]
    np.testing.assert_array_equal(ranked[1].numpy(), np.stack([found for _, found in expected]))
    np.testing.assert_array_equal(ranked[0].numpy(), np.stack([ids for ids, _ in expected]))


def unit_items(num_items: int = 20_000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(num_items, 64, generator=generator), dim=1)


def test_full_sized_blocks_find_what_one_query_at_a_time_finds_and_score_few_items() -> None:
    items, k = unit_items(), 20
    queries = 14 * items[:256].roll(1, 1)
    # The first of two blocks of queries is full, and items take two blocks.
    queries = torch.cat([queries, queries[:9]])
    scan, single = BatchScan(items), ItemScan(items, 0)
    with mock.patch.object(batch_scan, "sort_keys", wraps=batch_scan.sort_keys) as keys:
        ranked = scan.top_k(queries, k)
    assert ranked is not None
    assert sum(call.args[0].numel() for call in keys.call_args_list) < 4 * k * len(queries)
    for query in (0, 100, 264):
        ids, scores = single.top_k(queries[query], k)
        np.testing.assert_array_equal(ranked[0][query].numpy(), ids)
        np.testing.assert_array_equal(ranked[1][query].numpy(), scores)


def test_what_has_no_use_of_bounds_is_left_to_the_plain_product() -> None:
    items = unit_items(5000)
    scan = BatchScan(items)
    assert [scan.can_rank(k) for k in (0, 78, 79)] == [False, True, False]
    for bad in (0.0, 1e13, float("nan"), float("inf")):
        queries = items[:2].clone()
        queries[1] *= bad
        assert scan.top_k(queries, 1) is None
    for bad in (1e30, float("nan")):
        rows = sparse.csr_array(([np.float32(bad)], ([0], [3])), shape=(1, len(items)))
        assert scan.top_k(items[:1], 1, None, TermRows(rows, np.array([0, 1]))) is None
    # One item is so long that the others are all of the same code.
    long = items.clone()
    long[7] *= 1e6
    assert BatchScan(long).top_k(-long[7:8] * 1e-6, 20) is None


def test_items_without_bounds_have_no_scan() -> None:
    items = unit_items(5000)
    with mock.patch.object(batch_scan, "has_fast_products", return_value=True):
        assert BatchScan.where_faster(items) is not None
        for bad in (1e13, float("nan")):
            spoiled = items.clone()
            spoiled[4000, 3] = bad
            assert BatchScan.where_faster(spoiled) is None
        assert BatchScan.where_faster(items[:1000]) is None
    with mock.patch.object(batch_scan, "has_fast_products", return_value=False):
        assert BatchScan.where_faster(items) is None


def test_products_that_saturate_or_fail_are_not_used() -> None:
    def saturating(queries: Tensor, items: Tensor) -> Tensor:
        return (queries.int() @ items.int()).clamp(-(2**15), 2**15 - 1)

    for products in (saturating, mock.Mock(side_effect=RuntimeError("not implemented"))):
        batch_scan.has_fast_products.cache_clear()
        with mock.patch("torch._int_mm", products):
            assert not batch_scan.has_fast_products(16)
    batch_scan.has_fast_products.cache_clear()


def test_scores_that_are_not_numbers_are_refused() -> None:
    # Opposite infinities add up to NaN; a scan is not made of such items.
    scan = BatchScan(unit_items(5000))
    scan._items_RQ = scan._items_RQ.clone()
    scan._items_RQ[:, 0] = float("nan")
    with pytest.raises(UserError, match="not numbers"):
        scan.top_k(unit_items(5000)[:3], 1)
