"""Text-kNN: ranks items by the TF-IDF similarity of their texts to those of the clicked items.

It uses no interactions, so it also ranks items that are not in the training sessions. It is the control for language
models: their benefit is their improvement over this bag-of-words baseline.

Shapes: V items, U items of a batch, T distinct words, W words of all texts.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from llmgr_rec.baselines.item_similarity import cosine_similarity
from llmgr_rec.baselines.knn import DECAY, ItemNeighbors
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.words import words_of
from llmgr_rec.errors import UserError

TEXT_FIELDS = ("title", "category", "brand")
# Additions that compare an item with all others: the number of items with each of its words. Of words that are so
# common that they take more, the most common are not compared; otherwise the time would grow with the square of the
# number of items.
_MAX_ADDITIONS = 1 << 16


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
        words = WordIds()
        word_W, length_V = words.encode(texts)
        count_T = np.bincount(word_W, minlength=len(words.words))
        rows_VT = tf_idf_rows(word_W, length_V, count_T, len(texts))
        super().__init__(cosine_similarity(rows_VT.T.tocsr(), k_neighbors), decay)


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
    ids = WordIds()
    word_W, length_V = ids.encode(texts)
    count_T = np.bincount(word_W, minlength=len(ids.words))
    return ids.words, _weighted(word_W, length_V, count_T, len(texts))


class WordIds:
    """Numbers of words, in order of their first occurrence."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    @property
    def words(self) -> list[str]:
        """The words so far, by number."""
        return list(self._ids)

    def encode(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Splits texts by `words_of`.

        Args:
            texts: Texts; may be empty.

        Returns:
            The distinct words of each text, int32 [W], and their number in each text, int64.
        """
        ids, words, lengths = self._ids, list[int](), list[int]()
        for text in texts:
            distinct = dict.fromkeys(words_of(text))
            words += [ids.setdefault(word, len(ids)) for word in distinct]
            lengths.append(len(distinct))
        return np.array(words, np.int32), np.array(lengths, np.int64)


def tf_idf_rows(
    word_W: NDArray[np.int32], length_U: NDArray[np.int64], count_T: NDArray[np.int64], num_items: int
) -> sparse.csr_array:
    """Weights of the words by which items are compared, see `tf_idf`; without the most common ones of large catalogs.

    Args:
        word_W: Distinct words of each item, one item after the other.
        length_U: Number of words of each item.
        count_T: Number of items with each word, in the whole catalog.
        num_items: Number of items of the catalog.

    Returns:
        Sparse matrix [U, T], float64.
    """
    weights_UT = _weighted(word_W, length_U, count_T, num_items)
    rows = np.repeat(np.arange(len(length_U)), np.diff(weights_UT.indptr))
    counts = count_T[weights_UT.indices]
    order = np.lexsort((weights_UT.indices, counts, rows))
    sums = np.concatenate([[0], np.cumsum(counts[order])])
    is_common = sums[1:] - sums[weights_UT.indptr[rows]] > _MAX_ADDITIONS
    if is_common.any():
        weights_UT.data[order[is_common]] = 0
        weights_UT.eliminate_zeros()
    return weights_UT


def _weighted(
    word_W: NDArray[np.int32], length_U: NDArray[np.int64], count_T: NDArray[np.int64], num_items: int
) -> sparse.csr_array:
    weight_T = np.log(num_items / np.maximum(count_T, 1))
    offsets = np.concatenate([[0], np.cumsum(length_U)])
    weights_UT = sparse.csr_array((weight_T[word_W], word_W, offsets), shape=(len(length_U), len(count_T)))
    # A word of all texts has weight 0, and its entries would make every pair of items a neighbor candidate.
    weights_UT.eliminate_zeros()
    return weights_UT


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
