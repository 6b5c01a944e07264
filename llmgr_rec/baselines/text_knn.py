"""Text-kNN: items whose words are like those of the clicked ones. The control for models that read item text.

It knows no interaction, so an item that training never saw is to it like any other; and it knows no language, so that
what a language model adds is what it ranks better than this.

Shapes: V items, T distinct words, W words of all texts end to end.
"""

from collections.abc import Iterable

import numpy as np
from scipy import sparse

from llmgr_rec.baselines.knn import DECAY, ItemNeighbors
from llmgr_rec.baselines.sparse_scores import cosine_similarity
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.words import words_of
from llmgr_rec.errors import UserError

TEXT_FIELDS = ("title", "category", "brand")


class TextKNN(ItemNeighbors):
    """Cosine of the TF-IDF vectors of item texts; that of an item with itself is left out.

    An item without words scores 0, and so does one that is not among the nearest neighbors of any click.
    """

    def __init__(self, texts: list[str], decay: float = DECAY, k_neighbors: int = 300) -> None:
        """Computes the similarities.

        Args:
            texts: Text of each item, empty where it has none.
            decay: Weight of a click relative to the click after it.
            k_neighbors: Most similar items kept for each item, which bounds the memory (3.6 GB for a million items);
                0 keeps all.
        """
        super().__init__(cosine_similarity(tf_idf(texts), k_neighbors), decay)


def tf_idf(texts: list[str]) -> sparse.csr_array:
    """Weight of each word in each text, [T, V]: log(texts / texts with the word), however often it occurs there.

    Counting repetitions ranks worse: they come from category paths, which name a parent once for each child.

    Args:
        texts: One text an item. See `words_of`.
    """
    ids: dict[str, int] = {}
    found: list[int] = []
    offsets = [0]
    for text in texts:
        found += [ids.setdefault(word, len(ids)) for word in dict.fromkeys(words_of(text))]
        offsets.append(len(found))
    word_W = np.array(found, np.int64)
    count_T = np.bincount(word_W, minlength=len(ids))
    weight_T = np.log(len(texts) / np.maximum(count_T, 1))
    weights_VT = sparse.csr_array((weight_T[word_W], word_W, offsets), shape=(len(texts), len(ids)))
    # A word of every text says nothing, but would make every two items a pair.
    weights_VT.eliminate_zeros()
    return weights_VT.T.tocsr()


def has_words(texts: Iterable[str]) -> bool:
    """Whether any text has a word."""
    return any(map(words_of, texts))


def texts_to_compare(catalog: Catalog) -> list[str]:
    """Title, category and brand of each item; empty where it has none of them.

    Args:
        catalog: The items.

    Raises:
        UserError: No item has a word in them.
    """
    texts = catalog.texts(list(TEXT_FIELDS), required=False)
    if not has_words(texts):
        raise UserError(
            f"{catalog.file}: no item has a word in {', '.join(TEXT_FIELDS)}, by which text_knn ranks; prepare the "
            "data set with an item file that has text, or leave text_knn out"
        )
    return texts
