"""Re-ranker: gradient-boosted trees (LambdaMART) that correct the scores of the best items of a blend.

C. Burges, "From RankNet to LambdaRank to LambdaMART: An Overview", 2010. The trees see the model's score, what the
neighbors add to it, how far that is below the best of the list, and how often items were clicked: no ids, so that they
also serve another catalog. LightGBM trains and applies them; their text is part of the blend.

Shapes: B sessions, V items, K items of a list, D = `DEPTH` items at its top, F features.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from llmgr_rec.baselines.blend import Blend
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.errors import UserError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# Items at the top of a list that are ranked again.
DEPTH = 100
FEATURES = (
    "score",
    "model_score",
    "score_below_best",
    "model_score_below_best",
    "model_score_share",
    "clicks",
    "item_count",
    "last_click_count",
    "item_count_ratio",
)
# For each neighbor score: that of the item, the part of the last click, and the best of the list.
TERM_FEATURES = ("score", "last_click_score", "best_score")


@dataclass(frozen=True)
class Reranker:
    """Ranks the best items of each session again.

    Args:
        blend: The blend with its terms and the trees; its scores are those of the lists.
        train_count_V: Training clicks of each item.
    """

    blend: Blend
    train_count_V: Tensor
    _log_count_V: Floats = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts_V = np.log1p(self.train_count_V.cpu().numpy()).astype(np.float32)
        object.__setattr__(self, "_log_count_V", counts_V)
        # Here, because several threads may rank later.
        for term in self._terms:
            _sorted(term.similarity_VR)

    @classmethod
    def of(cls, blend: Blend | None, train_count_V: Tensor) -> "Reranker | None":
        """The re-ranker of a blend; None without trees."""
        return cls(blend, train_count_V) if blend is not None and blend.trees else None

    def rerank(self, ids_BK: Tensor, scores_BK: Tensor, clicks: Jagged) -> tuple[Tensor, Tensor]:
        """Ranks the first `DEPTH` items of each list again; the others keep their order behind them.

        Args:
            ids_BK: Item indices, best first; -1 pads shorter lists.
            scores_BK: Their scores by the model and the blend; -inf at padding.
            clicks: Item indices of each session, oldest first.

        Returns:
            Items and scores in their new order; ties are in order of item index.
        """
        if not ids_BK.numel() or not clicks.values.numel():
            return ids_BK, scores_BK
        ids, scores = ids_BK.cpu().numpy().copy(), scores_BK.cpu().numpy().copy()
        top_D = slice(0, DEPTH)
        corrected_BD = scores[:, top_D] + self.corrections(ids[:, top_D], scores[:, top_D], clicks)
        order_BD = np.lexsort((ids[:, top_D], -corrected_BD), axis=1)
        if ids.shape[1] > DEPTH:
            # Scores descend over the whole list.
            last_B, next_B = corrected_BD.min(axis=1), scores[:, DEPTH]
            is_full_B = np.isfinite(next_B)
            scores[is_full_B, DEPTH:] += np.minimum(last_B - next_B, 0)[is_full_B, None]
        ids[:, top_D] = np.take_along_axis(ids[:, top_D], order_BD, axis=1)
        scores[:, top_D] = np.take_along_axis(corrected_BD, order_BD, axis=1)
        return torch.from_numpy(ids).to(ids_BK.device), torch.from_numpy(scores).to(scores_BK.device)

    def corrections(self, ids_BD: Ints, scores_BD: Floats, clicks: Jagged) -> Floats:
        """What the trees add to the score of each item at the top of a list, float32 [B, D]; 0 at padding."""
        return self.corrections_of(self.features(ids_BD, scores_BD, clicks), ids_BD >= 0)

    def corrections_of(self, features_BDF: Floats, is_item_BD: NDArray[np.bool_]) -> Floats:
        """What the trees add by features, float32 [B, D]; 0 where there is no item."""
        added_BD = np.zeros(is_item_BD.shape, np.float32)
        if is_item_BD.any():
            threads = torch.get_num_threads()
            added_BD[is_item_BD] = self._booster.predict(features_BDF[is_item_BD], num_threads=threads)
        return added_BD

    def features(self, ids_BD: Ints, scores_BD: Floats, clicks: Jagged) -> Floats:
        """Features of the items at the top of lists, float32 [B, D, F]: `FEATURES`, then those of each neighbor score.

        Args:
            ids_BD: Item indices, best first; the features of padding are arbitrary.
            scores_BD: Their scores.
            clicks: Item indices of each session, oldest first.
        """
        is_item_BD, items_BD = ids_BD >= 0, np.maximum(ids_BD, 0)
        last_B = clicks.values.cpu().numpy()[np.maximum(clicks.offsets[1:].cpu().numpy() - 1, 0)]
        terms = [_entries(_sorted(term.scores(clicks)), np.arange(len(ids_BD)), items_BD) for term in self._terms]
        total_BD = np.where(is_item_BD, scores_BD, np.float32(-1e4))
        model_BD = total_BD - sum(terms)
        best_B1 = np.where(is_item_BD, model_BD, -np.inf).max(axis=1, initial=-1e4, keepdims=True)
        sum_B1 = np.log(np.exp(np.minimum(model_BD - best_B1, 0)).sum(axis=1, keepdims=True))
        item_count_BD, last_count_B1 = self._log_count_V[items_BD], self._log_count_V[last_B][:, None]
        by_feature = [
            total_BD,
            model_BD,
            total_BD - total_BD[:, :1],
            model_BD - best_B1,
            model_BD - best_B1 - sum_B1,
            np.log(np.maximum(clicks.lengths.cpu().numpy(), 1))[:, None],
            item_count_BD,
            last_count_B1,
            item_count_BD - last_count_B1,
        ]
        for term, added_BD in zip(self._terms, terms, strict=True):
            by_feature += [
                added_BD,
                _entries(term.similarity_VR, last_B, items_BD),
                added_BD.max(axis=1, keepdims=True),
            ]
        return np.stack([np.broadcast_to(values, ids_BD.shape) for values in by_feature], axis=-1).astype(np.float32)

    @property
    def _terms(self) -> tuple[Blend, ...]:
        return self.blend.terms or (self.blend,)

    @cached_property
    def _booster(self) -> Any:
        lightgbm = import_lightgbm()
        try:
            return lightgbm.Booster(model_str=self.blend.trees)
        except lightgbm.basic.LightGBMError as error:
            raise UserError(f"the trees of a blend are damaged ({error}); copy its bundle again") from None


def _sorted(matrix: sparse.csr_array) -> sparse.csr_array:
    matrix.sort_indices()
    return matrix


def _entries(matrix: sparse.csr_array, rows_B: Ints, columns_BD: Ints) -> Floats:
    """Entries of a sparse matrix, [B, D]; with sorted indices they are found by binary search."""
    rows_BD = np.broadcast_to(rows_B[:, None], columns_BD.shape)
    return np.asarray(matrix[rows_BD.ravel(), columns_BD.ravel()]).reshape(columns_BD.shape).astype(np.float32)


def import_lightgbm() -> Any:
    """The library LightGBM.

    Raises:
        UserError: It is not installed.
    """
    try:
        import lightgbm
    except ImportError:
        raise UserError("a re-ranker needs LightGBM; install it: pip install 'llmgr-rec[rerank]'") from None
    return lightgbm
