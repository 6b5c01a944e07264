"""Words that the texts of two items share, with their shares of the cosine by which text-kNN compares them.

Shapes: V items, T distinct words, W words of both texts.
"""

import numpy as np
from scipy import sparse

from llmgr_rec.baselines.sparse_scores import Floats, Ints
from llmgr_rec.baselines.text_knn import TEXT_FIELDS, word_weights
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.explanation.records import Word

_MOST_WORDS = 8


class SharedWords:
    """Compares the words of the texts of a catalog.

    Args:
        catalog: The items.

    Attributes:
        has_neighbors_V: Whether an item shares a word with another item that has training clicks, bool [V].
    """

    def __init__(self, catalog: Catalog) -> None:
        self._words, self._weights_VT = word_weights(catalog.texts(list(TEXT_FIELDS), required=False))
        # As cold-item smoothing counts neighbors.
        is_trained_V = (catalog.train_count_V > 0).numpy()
        has_VT = sparse.csr_array(self._weights_VT.astype(bool).astype(np.int64))
        trained_T = is_trained_V.astype(np.int64) @ has_VT
        itself_V = np.diff(has_VT.indptr) * is_trained_V
        self.has_neighbors_V = has_VT @ trained_T > itself_V

    def of(self, one: int, other: int) -> list[Word]:
        """The words of two items with the largest shares, the largest first.

        A word adds the product of its weights in both texts to their cosine.

        Args:
            one: Item index.
            other: Item index.
        """
        (words_one, weights_one), (words_other, weights_other) = self._row(one), self._row(other)
        words_W, first_W, second_W = np.intersect1d(words_one, words_other, assume_unique=True, return_indices=True)
        products_W = weights_one[first_W] * weights_other[second_W]
        order = np.argsort(-products_W, kind="stable")[:_MOST_WORDS]
        return [Word(self._words[words_W[place]], float(products_W[place] / products_W.sum())) for place in order]

    def _row(self, item: int) -> tuple[Ints, Floats]:
        """The words of an item and their weights."""
        matrix = self._weights_VT
        entries = slice(matrix.indptr[item], matrix.indptr[item + 1])
        return matrix.indices[entries], matrix.data[entries]
