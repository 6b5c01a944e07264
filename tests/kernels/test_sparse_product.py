"""Dense products of sparse matrices against SciPy's sparse ones, with and without MKL."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from llmgr_rec.kernels import sparse_product
from llmgr_rec.kernels.sparse_product import ALIGNED, SparseProduct


@given(st.integers(0, 2**32), st.integers(0, 9), st.integers(1, 150), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_dense_blocks_equal_the_sparse_product(seed: int, num_rows: int, width: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    right = sparse.random_array((7, width), density=density, rng=rng, format="csr")
    counts = rng.integers(0, 5, num_rows)
    # With several entries of one feature.
    arrays = (rng.normal(size=counts.sum()), rng.integers(0, 7, counts.sum()), np.concatenate([[0], np.cumsum(counts)]))
    left = sparse.csr_array(arrays, shape=(num_rows, 7))
    expected = (left @ right).toarray()
    for has_mkl in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sparse_product, "_BLOCK_VALUES", 4 * ALIGNED)
            if not has_mkl:
                patch.setattr(sparse_product, "has_mkl", lambda: False)
            product = SparseProduct(right)
            found = np.zeros((num_rows, -(-width // ALIGNED) * ALIGNED))
            for start, block in product.dense_blocks(left):
                found[start : start + len(block)] = block
        np.testing.assert_array_equal(found[:, :width], expected)
        assert not found[:, width:].any()
        np.testing.assert_array_equal(product.sparse_rows(left).toarray(), expected)
        assert (product.additions(left) >= np.diff(product.sparse_rows(left).indptr)).all()
