"""Approximate top-K for one query at a time: faiss finds candidates, which are scored exactly.

The items are divided into lists around centroids, with columns of 8 bits (IVF and SQ8 of faiss), and a query is
compared with the items of the nearest lists only. How many lists that are is measured when the index is made: about
the fewest that find the wanted share of the best items of sample queries.

    candidates = best items of the nearest lists, twice as many as there are places and excluded items,
                 and all items that have a sparse term
    list       = the K best candidates by their exact scores, sparse terms included

So the only items that can be missing are those without a sparse term that the nearest lists do not have. Scores and
their order are exact.

Shapes: R items, Q columns, K places, S sample queries, C candidates, E items with a sparse term.
"""

import logging
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmgr_rec.errors import UserError
from llmgr_rec.kernels.item_scan import Floats, Ints, ItemScan, best, exact_scores

logger = logging.getLogger(__name__)

# Best items of a sample query that the index has to find.
_SAMPLE_PLACES = 20
# Share of the misses that are allowed which sample queries may have, because other queries vary.
_SAFETY = 0.4
# An index that has to search more of its lists takes longer than an exact scan.
_MOST_LISTS_SEARCHED = 1 / 8
# Numbers of lists that are tried between the last two powers of two.
_HALVINGS = 3
# Lists relative to the square root of the number of items.
_LISTS_PER_ROOT = 4
# Items of a list and iterations that centroids are computed with.
_CENTROID_ITEMS, _ITERATIONS = 40, 6
# Candidates for each place or excluded item: columns of 8 bits order the items around the last place otherwise.
_CANDIDATES_PER_PLACE = 2
# Places and excluded items together up to which the index is searched.
_MOST_CANDIDATES = 512
_ROWS = 1 << 16


class ItemIndex:
    """An index of item vectors: Q + 8 bytes an item, in addition to the vectors and their scan.

    Args:
        items_RQ: Item vectors, float32.
        scan: Ranks exactly what the index does not: long lists, and choices of the items.
        samples_SQ: Queries like those to come, float32.
        recall: Wanted share of the best 20 items of a query, above 0 and at most 1.

    Attributes:
        recall: Share that was found of the best 20 items of the sample queries.
        is_used: Whether that is enough for the index to be of use.

    Raises:
        UserError: faiss is not installed.
    """

    def __init__(self, items_RQ: Tensor, scan: ItemScan, samples_SQ: Tensor, recall: float) -> None:
        faiss = import_faiss()
        self._items_RQ, self._scan = items_RQ, scan
        num_lists = 1 << round(math.log2(min(_LISTS_PER_ROOT * len(items_RQ) ** 0.5, len(items_RQ))))
        self._index = faiss.index_factory(items_RQ.shape[1], f"IVF{num_lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        self._index.cp.niter, self._index.cp.min_points_per_centroid = _ITERATIONS, 1
        self._index.cp.max_points_per_centroid = _CENTROID_ITEMS
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(torch.get_num_threads())
        try:
            sample = np.random.default_rng(0).permutation(len(items_RQ))[: _CENTROID_ITEMS * num_lists]
            self._index.train(items_RQ[torch.from_numpy(np.sort(sample))].numpy())
            for rows in items_RQ.split(_ROWS):
                self._index.add(rows.numpy())
        finally:
            faiss.omp_set_num_threads(threads)
        places = min(_SAMPLE_PLACES, len(items_RQ))
        exact_SK = [scan.top_k(query_Q, places)[0] for query_Q in samples_SQ]
        most = max(int(num_lists * _MOST_LISTS_SEARCHED), 1)
        self.recall = self._choose_lists(samples_SQ, exact_SK, 1 - (1 - recall) * _SAFETY, most)
        self.is_used = self.recall >= recall
        logger.log(
            logging.INFO if self.is_used else logging.WARNING,
            "index of %s items: recall@%d %.4f of %d sample sessions, %d of %d lists searched%s",
            f"{len(items_RQ):,}",
            _SAMPLE_PLACES,
            self.recall,
            len(samples_SQ),
            self._index.nprobe,
            num_lists,
            "" if self.is_used else f"; less than {recall:g}, so all items are ranked exactly",
        )

    def _choose_lists(self, samples_SQ: Tensor, exact_SK: list[Ints], wanted: float, most: int) -> float:
        """Finds how many lists to search, at most one eighth too many, and returns the recall."""
        too_few, self._index.nprobe = 0, 1
        while (recall := self._measured(samples_SQ, exact_SK)) < wanted and self._index.nprobe < most:
            too_few = self._index.nprobe
            self._index.nprobe *= 2
        enough = self._index.nprobe
        for _ in range(_HALVINGS if recall >= wanted else 0):
            self._index.nprobe = max((too_few + enough) // 2, 1)
            found = self._measured(samples_SQ, exact_SK)
            if found >= wanted:
                enough, recall = self._index.nprobe, found
            else:
                too_few = self._index.nprobe
        self._index.nprobe = enough
        return recall

    def _measured(self, samples_SQ: Tensor, exact_SK: list[Ints]) -> float:
        found, places = 0, len(exact_SK[0])
        for query_Q, exact in zip(samples_SQ, exact_SK, strict=True):
            found += len(np.intersect1d(self.top_k(query_Q, places)[0], exact))
        return found / (len(samples_SQ) * places)

    def _nearest(self, query_Q: Tensor, count: int) -> Ints:
        _, ids = self._index.search(query_Q.unsqueeze(0).numpy(), _CANDIDATES_PER_PLACE * count)
        nearest: Ints = ids[0][ids[0] >= 0]
        return nearest

    def top_k(
        self,
        query_Q: Tensor,
        k: int,
        exclude: Ints | None = None,
        added: tuple[Ints, Floats] | None = None,
        is_allowed_R: NDArray[np.bool_] | None = None,
    ) -> tuple[Ints, Floats]:
        """Finds the K best items of a query, but for those that the index misses; see `ItemScan.top_k`."""
        excluded = np.zeros(0, np.int64) if exclude is None else exclude
        if is_allowed_R is None and k + len(excluded) <= _MOST_CANDIDATES:
            items_C = np.union1d(self._nearest(query_Q, k + len(excluded)), excluded if added is None else added[0])
            items_C = np.setdiff1d(items_C, excluded, assume_unique=True)
            if len(items_C) >= k:
                return best(items_C, exact_scores(self._items_RQ, items_C, query_Q.double(), added), k)
        return self._scan.top_k(query_Q, k, exclude, added, is_allowed_R)


def check_recall(recall: object, name: str) -> None:
    """Checks a wanted recall, and that it can be had.

    Args:
        recall: The share.
        name: Name of the argument, for messages.

    Raises:
        UserError: It is no share, or faiss is not installed.
    """
    if isinstance(recall, bool) or not isinstance(recall, int | float) or not 0 < recall <= 1:
        raise UserError(
            f"{name} is {recall!r}; give the share of the best items that the index must find, such as 0.99"
        )
    import_faiss()


def import_faiss() -> Any:
    """The library faiss.

    Raises:
        UserError: It is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise UserError("an index needs faiss; install it: pip install 'llmgr-rec[index]'") from None
    return faiss
