"""How much work the sparse products of baselines are: counts that are the same on any machine."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor

from llmgr_rec.baselines.blend import Blend
from llmgr_rec.baselines.item_similarity import cosine_similarity
from llmgr_rec.baselines.knn import ItemNeighbors, SessionKNN, session_matrix
from llmgr_rec.data.jagged import Jagged

NUM_ITEMS, NUM_SESSIONS, NEIGHBORS = 300, 400, 20
# Additions relative to those of the definition: blocks, or another version of SciPy or torch, may add a few.
SLACK = 1.05
MOST_PRODUCTS = 8


class Products:
    """Counts products of two sparse matrices, and their additions, by SciPy and by torch."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls = self.additions = 0
        multiply, add = sparse.csr_array.__matmul__, torch.addmm

        def product(left: sparse.csr_array, right: Any) -> Any:
            if sparse.issparse(right):
                self._count(left.indices, sparse.csr_array(right).indptr)
            return multiply(left, right)

        def added(first: Tensor, left: Tensor, right: Tensor, **options: Any) -> Tensor:
            if left.layout == right.layout == torch.sparse_csr:
                self._count(left.col_indices().numpy(), right.crow_indices().numpy())
            return add(first, left, right, **options)

        patch.setattr(sparse.csr_array, "__matmul__", product)
        patch.setattr(torch, "addmm", added)

    def _count(self, columns: np.ndarray, offsets: np.ndarray) -> None:
        self.calls += 1
        self.additions += int(np.diff(offsets)[columns].sum())


def clicks(num_sessions: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(num_sessions)
    offsets_B1 = np.concatenate([[0], generator.integers(1, 9, num_sessions).cumsum()])
    return generator.integers(0, NUM_ITEMS, offsets_B1[-1]), offsets_B1


def sessions() -> sparse.csr_array:
    return session_matrix([clicks(NUM_SESSIONS)], NUM_ITEMS)


def test_each_pair_of_items_is_compared_once_for_each_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    features_FV = sessions()
    counted = Products(monkeypatch)
    cosine_similarity(features_FV, NEIGHBORS)
    assert 0 < counted.additions <= SLACK * (np.diff(features_FV.indptr).astype(np.int64) ** 2).sum()
    assert counted.calls <= MOST_PRODUCTS


@pytest.mark.parametrize("num_sessions", [50, 500])
def test_each_neighbor_of_each_click_is_added_once(num_sessions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    similarity_VV = cosine_similarity(sessions(), NEIGHBORS)
    items_L, offsets_B1 = clicks(num_sessions)
    neighbors = int(np.diff(similarity_VV.indptr)[items_L].sum())
    counted = Products(monkeypatch)
    ItemNeighbors(similarity_VV, 0.7).rank(items_L, offsets_B1, 20)
    assert 0 < counted.additions <= SLACK * neighbors
    assert counted.calls <= MOST_PRODUCTS

    blend = Blend({"item_knn": 1.0}, similarity_VV.astype(np.float32), 0.7)
    jagged = Jagged(torch.from_numpy(items_L), torch.from_numpy(offsets_B1))
    counted.calls = counted.additions = 0
    blend.scores(jagged)
    assert counted.additions <= SLACK * neighbors
    assert counted.calls == 1
    # What ranking adds instead has an entry for each neighbor of each click, and needs no product.
    rows = blend.term_rows(jagged)
    assert rows is not None
    assert rows.rows_LR.nnz == neighbors
    assert counted.calls == 1


def test_session_knn_adds_the_sessions_of_clicks_and_the_items_of_neighbors(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions_SV, (items_L, offsets_B1) = sessions(), clicks(50)
    of_clicks = np.bincount(sessions_SV.indices, minlength=NUM_ITEMS)[items_L].sum()
    of_neighbors = 50 * NEIGHBORS * np.diff(sessions_SV.indptr).max()
    baseline = SessionKNN(sessions_SV, NEIGHBORS)
    counted = Products(monkeypatch)
    baseline.rank(items_L, offsets_B1, 20)
    assert 0 < counted.additions <= SLACK * (of_clicks + of_neighbors)
    assert counted.calls <= MOST_PRODUCTS
