"""Cosine similarity of items with bounded memory.

Shapes: V items, F features, U items of a range.
"""

from collections.abc import Iterator

import numpy as np
from scipy import sparse

from llmgr_rec.baselines.sparse_scores import blocks, high_products, nearest
from llmgr_rec.kernels.sparse_product import SparseProduct

# Maximum number of additions of a block, which bounds its memory to some 30 MB. It is larger with more columns, because
# a sparse product takes time for each of them.
_BLOCK_ADDITIONS = 1_000_000


def cosine_similarity(features_FV: sparse.csr_array, k_neighbors: int = 0) -> sparse.csr_array:
    """Item-item cosine similarity without the diagonal, computed in blocks of items.

    Memory is bounded by the block size and the result. Time is proportional to the sum over features of the squared
    number of items with the feature.

    Args:
        features_FV: Non-negative features of the items, one column per item, such as training sessions or words.
        k_neighbors: Number of most similar items per item (ties: lower index); 0 keeps all.

    Returns:
        Sparse matrix [V, V] of cosines above 0.
    """
    units_FV = unit_columns(features_FV)
    product, units_VF = SparseProduct(units_FV), units_FV.T.tocsr()
    similarities = [sparse.csr_array((0, features_FV.shape[1])), *similar_blocks(product, units_VF, k_neighbors, 0)]
    return sparse.vstack(similarities, format="csr")


def similar_blocks(
    product: SparseProduct, units_UF: sparse.csr_array, k_neighbors: int, first_item: int | None
) -> Iterator[sparse.csr_array]:
    """Cosines of items with all items of a product, block by block.

    Args:
        product: Unit vectors of the compared items, which are its columns.
        units_UF: Unit vectors of the items.
        k_neighbors: Number of most similar items per item (ties: lower index); 0 keeps all.
        first_item: If the items are also columns, the column of the first; an item is not compared with itself.

    Yields:
        Cosines above 0 of the next items.
    """
    width = product.width
    limit = max(_BLOCK_ADDITIONS, width)
    for start, stop in blocks(np.minimum(product.additions(units_UF), width), limit):
        first = None if first_item is None else first_item + start
        cosines = high_products(product, units_UF[start:stop], k_neighbors or width, first_item=first)
        yield nearest(cosines, k_neighbors) if k_neighbors else cosines


def unit_columns(features_FV: sparse.csr_array) -> sparse.csr_array:
    """Scales each column to length 1; columns of zeros stay."""
    squares_V = np.bincount(features_FV.indices, features_FV.data**2, minlength=features_FV.shape[1])
    scale_V = 1 / np.sqrt(np.where(squares_V > 0, squares_V, 1.0))
    scaled = features_FV.data * scale_V[features_FV.indices]
    return sparse.csr_array((scaled, features_FV.indices, features_FV.indptr), features_FV.shape)


def unit_rows(items_VF: sparse.csr_array) -> sparse.csr_array:
    """Scales each row to length 1, and sorts its entries; rows of zeros stay.

    Args:
        items_VF: Features of items, one row per item; sorted in place.
    """
    items_VF.sort_indices()
    rows = np.repeat(np.arange(items_VF.shape[0]), np.diff(items_VF.indptr))
    squares_V = np.bincount(rows, items_VF.data**2, minlength=items_VF.shape[0])
    scale_V = 1 / np.sqrt(np.where(squares_V > 0, squares_V, 1.0))
    return sparse.csr_array((items_VF.data * scale_V[rows], items_VF.indices, items_VF.indptr), items_VF.shape)
