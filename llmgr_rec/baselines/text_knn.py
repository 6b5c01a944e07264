"""Text-kNN: ranks items by the TF-IDF similarity of their texts to those of the clicked items.

It uses no interactions, so it also ranks items that are not in the training sessions. It is the control for language
models: their benefit is their improvement over this bag-of-words baseline.

Shapes: V items, T distinct words, W words of all texts.
"""

from collections.abc import Iterable

import numpy as np
from scipy import sparse

from llmgr_rec.baselines.item_similarity import cosine_similarity
from llmgr_rec.baselines.knn import DECAY, ItemNeighbors
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.words import words_of
from llmgr_rec.errors import UserError

TEXT_FIELDS = ("title", "category", "brand")


class TextKNN(ItemNeighbors):
    """Item neighbors by the cosine of the TF-IDF vectors of item texts. The similarity of an item to itself is 0.

    Items without words, and items that are not a neighbor of any click, have score 0.
    """

    def __init__(self, texts: list[str], decay: float = DECAY, k_neighbors: int = 300) -> None:
        """Computes the similarities.

        Args:
            texts: Text of each item; may be empty.
            decay: Weight of a click relative to the click after it.
            k_neighbors: Number of neighbors per item, which bounds the memory (3.6 GB for a million items and 300
                neighbors); 0 keeps all.
        """
        super().__init__(cosine_similarity(tf_idf(texts), k_neighbors), decay)


def tf_idf(texts: list[str]) -> sparse.csr_array:
    """Weights of words in texts: binary term frequency times inverse document frequency log(V / texts with the word).

    Term counts gave worse rankings: repetitions come from category paths, which name a parent once per child.

    Args:
        texts: Text of each item; it is split by `words_of`.

    Returns:
        Sparse matrix [T, V], float64.
    """
    return word_weights(texts)[1].T.tocsr()


def word_weights(texts: list[str]) -> tuple[list[str], sparse.csr_array]:
    """The words of texts and their weights, see `tf_idf`.

    Args:
        texts: Text of each item.

    Returns:
        The T distinct words, and a sparse matrix [V, T], float64.
    """
    ids: dict[str, int] = {}
    words: list[int] = []
    offsets = [0]
    for text in texts:
        words += [ids.setdefault(word, len(ids)) for word in dict.fromkeys(words_of(text))]
        offsets.append(len(words))
    word_W = np.array(words, np.int64)
    count_T = np.bincount(word_W, minlength=len(ids))
    weight_T = np.log(len(texts) / np.maximum(count_T, 1))
    weights_VT = sparse.csr_array((weight_T[word_W], word_W, offsets), shape=(len(texts), len(ids)))
    # A word of all texts has weight 0, and its entries would make every pair of items a neighbor candidate.
    weights_VT.eliminate_zeros()
    return list(ids), weights_VT


def has_words(texts: Iterable[str]) -> bool:
    """Whether any text has a word."""
    return any(map(words_of, texts))


def texts_to_compare(catalog: Catalog) -> list[str]:
    """Title, category and brand of each item, joined; may be empty.

    Args:
        catalog: The items.

    Raises:
        UserError: All texts are without words.
    """
    texts = catalog.texts(list(TEXT_FIELDS), required=False)
    if not has_words(texts):
        raise UserError(
            f"{catalog.file}: no item has a word in {', '.join(TEXT_FIELDS)}, by which text_knn ranks; prepare the "
            "data set with an item file that has text, or leave text_knn out"
        )
    return texts
