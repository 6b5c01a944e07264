"""Cosine similarity of items with bounded memory.

Shapes: V items, F features, U items of a block, D >= V columns of a dense block.
"""

import numpy as np
from scipy import sparse

from llmgr_rec.baselines.sparse_scores import blocks, high_products, nearest
from llmgr_rec.kernels.sparse_product import SparseProduct

# Maximum number of additions of a block, which bounds its memory to some 30 MB.
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
    num_items = features_FV.shape[1]
    units_FV = unit_columns(features_FV)
    units_VF = units_FV.T.tocsr()
    product = SparseProduct(units_FV)
    additions_V = product.additions(units_VF)
    similarities = [sparse.csr_array((0, num_items))]
    for start, stop in blocks(np.minimum(additions_V, num_items), _BLOCK_ADDITIONS):
        cosine_UV = high_products(product, units_VF[start:stop], k_neighbors or num_items, first_item=start)
        similarities.append(nearest(cosine_UV, k_neighbors) if k_neighbors else cosine_UV)
    return sparse.vstack(similarities, format="csr")


def unit_columns(features_FV: sparse.csr_array) -> sparse.csr_array:
    """Scales each column to length 1; columns of zeros stay."""
    squares_V = np.bincount(features_FV.indices, features_FV.data**2, minlength=features_FV.shape[1])
    scale_V = 1 / np.sqrt(np.where(squares_V > 0, squares_V, 1.0))
    scaled = features_FV.data * scale_V[features_FV.indices]
    return sparse.csr_array((scaled, features_FV.indices, features_FV.indptr), features_FV.shape)
