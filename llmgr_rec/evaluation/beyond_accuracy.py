"""Properties of ranked lists beside their accuracy: catalog coverage, novelty, diversity, popularity and ties.

All are of the first 20 items of the lists, and are sums over lists, so they do not depend on batch size, order or
number of ranks.

Shapes: B sessions, K items of a ranked list, V items, X distinct items of all lists, F ids
of a feature, W places of all lists.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.evaluation.results import K

# Lists whose diversity is measured together, which takes less time than in smaller batches.
_MEASURED_LISTS = 8192
# Features of items, by the diversity that is measured with them.
_DIVERSITY = {"category_diversity": "category", "text_diversity": "word"}


class ItemProperties:
    """What `BeyondAccuracy` needs to know of the items of a catalog.

    Args:
        catalog: The items.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.train_count_V = catalog.train_count_V.numpy()
        total = int(self.train_count_V.sum()) + len(self.train_count_V)
        self.surprise_V = np.log2(total) - np.log2(self.train_count_V + 1)
        self.features = {
            name: FeatureVectors(catalog.features[feature])
            for name, feature in _DIVERSITY.items()
            if feature in catalog.features
        }


class FeatureVectors:
    """One vector of length 1 an item: its ids of a feature, weighted by log(V / items with the id).

    Args:
        ids: Ids of the feature, a row for each of the V items.
    """

    def __init__(self, ids: Jagged) -> None:
        self._ids = ids
        values = ids.values.numpy()
        count_F = np.bincount(values)
        self._weight_F = np.log(ids.num_rows / np.maximum(count_F, 1))

    def similarities(self, ids_BK: Tensor) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Sum of the cosines of all pairs of different items in each list, and the number of these pairs.

        Items without a feature take part in no pair.

        Args:
            ids_BK: Item indices; -1 pads shorter lists.

        Returns:
            Sums, float64 [B], and numbers, int64 [B]; each pair counts twice.
        """
        listed_BK = ids_BK.numpy() >= 0
        place_W = ids_BK.numpy()[listed_BK]
        is_listed_V = np.zeros(self._ids.num_rows, bool)
        is_listed_V[place_W] = True
        items_X = np.flatnonzero(is_listed_V)
        row_W = (np.cumsum(is_listed_V) - 1)[place_W]
        vectors_XF = self._vectors(items_X)
        has_vector_W = (np.diff(vectors_XF.indptr) > 0)[row_W]
        lists_B1 = np.concatenate([[0], np.cumsum(listed_BK.sum(axis=1))])
        members_BX = sparse.csr_array((has_vector_W.astype(np.float64), row_W, lists_B1), (len(ids_BK), len(items_X)))
        # The squared length of the sum of n unit vectors is n plus the cosines of all pairs.
        squared_B = _squared_lengths(members_BX @ vectors_XF)
        count_B = np.diff(np.concatenate([[0], np.cumsum(has_vector_W)])[lists_B1])
        return squared_B - count_B, count_B * (count_B - 1)

    def _vectors(self, items_X: NDArray[np.int64]) -> sparse.csr_array:
        """Vectors of some items, [X, F]; without an entry for ids that all items have."""
        rows = self._ids.select(torch.from_numpy(items_X))
        values = rows.values.numpy()
        shape = (len(items_X), len(self._weight_F))
        vectors_XF = sparse.csr_array((self._weight_F[values], values, rows.offsets.numpy()), shape)
        vectors_XF.eliminate_zeros()
        vectors_XF.data /= np.repeat(np.sqrt(_squared_lengths(vectors_XF)), np.diff(vectors_XF.indptr))
        return vectors_XF


def _squared_lengths(rows: sparse.csr_array) -> NDArray[np.float64]:
    """Sum of the squared entries of each row."""
    return np.add.reduceat(np.append(rows.data**2, 0.0), rows.indptr[:-1]) * (np.diff(rows.indptr) > 0)


class BeyondAccuracy:
    """Sums over ranked lists, and the properties computed from them.

    Args:
        items: Properties of the items.
    """

    def __init__(self, items: ItemProperties) -> None:
        self._items = items
        # Number of lists with each item.
        self._listed_V = np.zeros(len(items.train_count_V), np.int64)
        self._sums: dict[str, float] = dict.fromkeys(["lists", "target_clicks", "ties", "neighbors"], 0.0)
        for name in items.features:
            self._sums |= {name: 0.0, f"{name}_lists": 0.0}
        # Lists whose diversity is not measured yet.
        self._pending: list[Tensor] = []
        self._num_pending = 0

    def update(self, ids_BK: Tensor, scores_BK: Tensor, targets_B: Tensor, weights_B: Tensor) -> None:
        """Adds one batch of ranked lists.

        Args:
            ids_BK: Item indices, best first, at least 20 unless the catalog is smaller; -1 pads shorter lists.
            scores_BK: Their scores.
            targets_B: Target item of each session.
            weights_B: Weight of each session; those of weight 0 are padding and are left out.
        """
        is_real_B = (weights_B > 0).cpu()
        ids_BK, scores_BK = ids_BK.cpu()[is_real_B, :K], scores_BK.cpu()[is_real_B, :K]
        targets_B = targets_B.cpu()[is_real_B]
        is_pair = ids_BK[:, 1:] >= 0
        sums = self._sums
        sums["lists"] += len(ids_BK)
        sums["target_clicks"] += float(self._items.train_count_V[targets_B.numpy()].sum())
        sums["ties"] += int(((scores_BK[:, 1:] == scores_BK[:, :-1]) & is_pair).sum())
        sums["neighbors"] += int(is_pair.sum())
        self._pending.append(ids_BK)
        self._num_pending += len(ids_BK)
        if self._num_pending >= _MEASURED_LISTS:
            self._measure_pending()

    def _measure_pending(self) -> None:
        if not self._pending:
            return
        ids_BK = torch.cat(self._pending)
        self._pending, self._num_pending = [], 0
        places = ids_BK[ids_BK >= 0].numpy()
        self._listed_V += np.bincount(places, minlength=len(self._listed_V))
        for name, vectors in self._items.features.items():
            cosines_B, pairs_B = vectors.similarities(ids_BK)
            has_pairs_B = pairs_B > 0
            self._sums[name] += float((1 - cosines_B[has_pairs_B] / pairs_B[has_pairs_B]).sum())
            self._sums[f"{name}_lists"] += int(has_pairs_B.sum())

    def compute(self, sum_over_ranks: Callable[[Tensor], object] | None = None) -> dict[str, float | None]:
        """Properties of all lists added so far.

        Args:
            sum_over_ranks: Sums a tensor over the ranks of a process group, in place; None without one.

        Returns:
            `coverage` (share of the catalog that is in any list), `novelty` (mean of -log2 of an item's share of the
            training clicks, in bits; one click is added to every item), `popularity_bias` (mean training clicks of a
            listed item relative to those of a target), `ties` (share of neighboring places with equal scores), and
            `category_diversity` and `text_diversity` (1 - mean cosine of the pairs of a list); None where there is
            nothing to measure.
        """
        self._measure_pending()
        names = list(self._sums)
        values = torch.tensor([*self._sums.values()], dtype=torch.float64)
        counts_V = torch.from_numpy(self._listed_V.astype(np.float64))
        if sum_over_ranks is not None:
            sum_over_ranks(values)
            sum_over_ranks(counts_V)
        sums, listed_V = dict(zip(names, values.tolist(), strict=True)), counts_V.numpy()
        places, clicks = float(listed_V.sum()), float(listed_V @ self._items.train_count_V)
        bias = _ratio(_ratio(clicks, places), _ratio(sums["target_clicks"], sums["lists"]))
        found = {
            "coverage": int((listed_V > 0).sum()) / len(listed_V),
            "novelty": _ratio(float(listed_V @ self._items.surprise_V), places),
            "popularity_bias": bias,
            "ties": _ratio(sums["ties"], sums["neighbors"]),
        }
        return found | {name: _ratio(sums[name], sums[f"{name}_lists"]) for name in self._items.features}


def _ratio(part: float | None, whole: float | None) -> float | None:
    # Rounded, because the last digits of a sum depend on its order.
    return round(part / whole, 9) if part is not None and whole else None
