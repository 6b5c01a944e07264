"""Embedding-kNN: ranks items by the similarity of text embeddings of a pre-trained model to those of the clicked items.

Hidden states of a language model have a few large common components, so cosines of the plain embeddings hardly differ.
Whitening (Su et al., arXiv 2103.15316) gives all principal directions of the catalog nearly the same variance.

Shapes: V items, W items with text, U items of a block, H columns, P principal directions, K neighbors.
"""

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from llmgr_rec.baselines.knn import DECAY, ItemNeighbors
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.kernels.topk import top_k

# Added to the deviation that a direction is divided by, as a share of the largest one: directions that hardly vary are
# noise.
_MIN_DEVIATION = 0.02
# Texts for each direction that is kept. With as many directions as texts, whitening would make all pairs of texts
# equally similar.
_TEXTS_PER_DIRECTION = 8
# Items whose neighbors are searched at a time.
_BLOCK_ITEMS = 1024


class EmbeddingKNN(ItemNeighbors):
    """Item neighbors by the cosine of whitened text embeddings. The similarity of an item to itself is 0.

    Items without text, and items that are not a neighbor of any click, have score 0.
    """

    def __init__(self, embeddings_VH: Tensor, decay: float = DECAY, k_neighbors: int = 300) -> None:
        """Computes the similarities, in time proportional to the square of the number of items.

        Args:
            embeddings_VH: Text embedding of each item, float32; zeros for an item without text.
            decay: Weight of a click relative to the click after it.
            k_neighbors: Number of neighbors per item.
        """
        super().__init__(nearest_by_cosine(whiten(embeddings_VH), k_neighbors), decay)


def whiten(embeddings_VH: Tensor) -> Tensor:
    """Centers embeddings and divides the largest principal directions by their deviations; zeros stay zeros.

    Args:
        embeddings_VH: Text embedding of each item; zeros for an item without text.

    Returns:
        float32 [V, P].
    """
    has_text_V = embeddings_VH.any(dim=1)
    texts_WH = embeddings_VH[has_text_V].double()
    kept = min(texts_WH.shape[1], max(len(texts_WH) // _TEXTS_PER_DIRECTION, 1))
    whitened_VP = embeddings_VH.new_zeros(len(embeddings_VH), kept)
    if len(texts_WH):
        centered_WH = texts_WH - texts_WH.mean(dim=0)
        # In ascending order.
        variances_H, directions_HH = torch.linalg.eigh(centered_WH.T @ centered_WH / len(texts_WH))
        deviations_P = variances_H[-kept:].clamp(min=0).sqrt()
        scale_P = deviations_P + _MIN_DEVIATION * deviations_P[-1]
        # Without any variance all texts are equal, and no item is nearer than another.
        scaled_WP = centered_WH @ directions_HH[:, -kept:] / scale_P.clamp(min=torch.finfo(torch.float32).tiny)
        whitened_VP[has_text_V] = scaled_WP.float()
    return whitened_VP


def nearest_by_cosine(vectors_VH: Tensor, k_neighbors: int) -> sparse.csr_array:
    """The k most similar other items of each item by cosine.

    Args:
        vectors_VH: Vectors of the items, float32.
        k_neighbors: Number of neighbors per item; ties are in order of item index.

    Returns:
        Sparse matrix [V, V] of cosines above 0.
    """
    num_items = len(vectors_VH)
    units_VH = functional.normalize(vectors_VH)
    rows = [sparse.csr_array((0, num_items))]
    for start in range(0, num_items, _BLOCK_ITEMS):
        items_U = torch.arange(start, min(start + _BLOCK_ITEMS, num_items))
        itself = Jagged(items_U, torch.arange(len(items_U) + 1))
        ids_UK, cosines_UK = top_k(units_VH[items_U], units_VH, min(k_neighbors, num_items), itself)
        kept_UK = (cosines_UK > 0).numpy()
        offsets = np.concatenate([[0], np.cumsum(kept_UK.sum(axis=1))])
        entries = (cosines_UK.numpy()[kept_UK].astype(np.float64), ids_UK.numpy()[kept_UK], offsets)
        rows.append(sparse.csr_array(entries, shape=(len(items_U), num_items)))
    return sparse.csr_array(sparse.vstack(rows, format="csr"))
