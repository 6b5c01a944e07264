"""Words that the texts of two items share, with their shares of the cosine by which text-kNN compares them.

Shapes: V items, T distinct words.
"""

import numpy as np

from llmgr_rec.baselines.text_knn import TEXT_FIELDS, word_weights
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.explanation.records import Word

_MOST_WORDS = 8


class SharedWords:
    """Compares the words of the texts of a catalog.

    Args:
        catalog: The items.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._words, self._weights_VT = word_weights(catalog.texts(list(TEXT_FIELDS), required=False))

    def of(self, one: int, other: int) -> list[Word]:
        """The words of two items with the largest shares, the largest first.

        A word adds the product of its weights in both texts to their cosine.

        Args:
            one: Item index.
            other: Item index.
        """
        products_T = self._weights_VT[[one]].multiply(self._weights_VT[[other]]).tocsr()
        total, order = products_T.data.sum(), np.argsort(-products_T.data, kind="stable")[:_MOST_WORDS]
        return [Word(self._words[products_T.indices[place]], float(products_T.data[place] / total)) for place in order]
