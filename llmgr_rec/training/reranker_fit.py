"""Fits the trees of a re-ranker on validation sessions, and keeps them where cross-validation shows a gain.

Shapes: S sessions whose target is among the `DEPTH` best items, D = `DEPTH` items of a list, F features.
"""

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from llmgr_rec.baselines.blend import Blend, clicks_of
from llmgr_rec.baselines.reranker import DEPTH, Floats, Ints, Reranker, import_lightgbm
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.ranking import RankingModel
from llmgr_rec.evaluation.intervals import K, count_pairs, paired_gains
from llmgr_rec.evaluation.protocol import ranked_lists

logger = logging.getLogger(__name__)

_FOLDS = 3
_TREES = 100
_PARAMETERS = {
    "objective": "lambdarank",
    "lambdarank_truncation_level": 30,
    "num_leaves": 7,
    "learning_rate": 0.05,
    "min_data_in_leaf": 200,
    "lambda_l2": 10.0,
    "feature_fraction": 0.8,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "max_bin": 63,
    "seed": 0,
    "deterministic": True,
    "force_row_wise": True,
    "verbose": -1,
}


@dataclass(frozen=True)
class _Lists:
    """The best items of the sessions whose target is among them.

    Args:
        ids_SD: Item indices, -1 at padding.
        scores_SD: Their scores.
        features_SDF: Their features.
        is_target_SD: Whether an item is the target.
    """

    ids_SD: Ints
    scores_SD: Floats
    features_SDF: Floats
    is_target_SD: NDArray[np.bool_]

    def rows(self, rows_S: Ints) -> "_Lists":
        """The lists of some sessions."""
        return _Lists(*(values[rows_S] for values in vars(self).values()))

    def target_ranks(self, added_SD: Floats) -> Ints:
        """Number of items ahead of each target by the scores plus others."""
        scores_SD = (self.scores_SD + added_SD).astype(np.float32)
        target_S = self.is_target_SD.argmax(axis=1)[:, None]
        own_S1 = np.take_along_axis(scores_SD, target_S, axis=1)
        item_S1 = np.take_along_axis(self.ids_SD, target_S, axis=1)
        is_ahead_SD = (scores_SD > own_S1) | ((scores_SD == own_S1) & (self.ids_SD < item_S1))
        return np.asarray((is_ahead_SD & (self.ids_SD >= 0)).sum(axis=1))


def with_trees(blend: Blend, ranking: RankingModel, dataset: Dataset, catalog: Catalog, world: World) -> Blend:
    """The blend with trees that rank its best items again, or as it is if these gain nothing.

    Args:
        blend: The selected blend.
        ranking: The trained model.
        dataset: Prepared sessions; the trees learn from those of the validation split.
        catalog: Their items.
        world: A single rank.

    Raises:
        UserError: LightGBM is not installed.
    """
    import_lightgbm()
    lists = _validation_lists(replace(ranking, blend=blend, reranker=None), dataset, catalog, world)
    fold_S = np.random.default_rng(0).integers(_FOLDS, size=len(lists.ids_SD))
    if not all(0 < (fold_S == fold).sum() < len(fold_S) for fold in range(_FOLDS)):
        logger.info("re-ranker: too few validation sessions have their target among the best %d items", DEPTH)
        return blend
    added_SD = np.zeros_like(lists.scores_SD)
    for fold in range(_FOLDS):
        trees = _fit(lists.rows(np.flatnonzero(fold_S != fold)))
        added_SD[fold_S == fold] = _added(trees, blend, catalog, lists.rows(np.flatnonzero(fold_S == fold)))
    before_S, after_S = lists.target_ranks(np.zeros_like(added_SD)), lists.target_ranks(added_SD)
    # Sessions without their target among the best items have no gain with either.
    gain = paired_gains(count_pairs(after_S, before_S))[f"ndcg@{K}"]
    keeps = gain is not None and gain.low > 0
    if gain is not None:
        shown = tuple(100 * value for value in (gain.mean, gain.low, gain.high))
        what = "kept" if keeps else "not kept"
        logger.info("re-ranker: cross-validated NDCG@20 %+.1f %% [%.1f .. %.1f], %s", *shown, what)
    return replace(blend, trees=_fit(lists)) if keeps else blend


def _validation_lists(ranking: RankingModel, dataset: Dataset, catalog: Catalog, world: World) -> _Lists:
    assert ranking.blend is not None
    reranker = Reranker(ranking.blend, catalog.train_count_V)
    found: list[_Lists] = []
    for ids_BD, scores_BD, batch in ranked_lists(ranking, dataset, "valid", world, depth=DEPTH):
        is_target_BD = ids_BD == batch.targets_B[:, None]
        rows_S = torch.nonzero(is_target_BD.any(dim=1) & (batch.weights_B > 0)).flatten()
        ids_SD, scores_SD = ids_BD[rows_S].cpu().numpy(), scores_BD[rows_S].cpu().numpy()
        features_SDF = reranker.features(ids_SD, scores_SD, clicks_of(batch).select(rows_S))
        found.append(_Lists(ids_SD, scores_SD, features_SDF, is_target_BD[rows_S].cpu().numpy()))
    return _Lists(*(np.concatenate([getattr(lists, name) for lists in found]) for name in vars(found[0])))


def _fit(lists: _Lists) -> str:
    """The text of trees that start from the scores of the lists."""
    lightgbm = import_lightgbm()
    is_item_SD = lists.ids_SD >= 0
    examples = lightgbm.Dataset(
        lists.features_SDF[is_item_SD],
        lists.is_target_SD[is_item_SD].astype(np.int32),
        group=is_item_SD.sum(axis=1),
        init_score=lists.scores_SD[is_item_SD].astype(np.float64),
    )
    threads = {"num_threads": torch.get_num_threads()}
    return str(lightgbm.train({**_PARAMETERS, **threads}, examples, _TREES).model_to_string())


def _added(trees: str, blend: Blend, catalog: Catalog, lists: _Lists) -> Floats:
    """What trees add to the scores of lists, float32 [S, D]."""
    reranker = Reranker(replace(blend, trees=trees), catalog.train_count_V)
    return reranker.corrections_of(lists.features_SDF, lists.ids_SD >= 0)
