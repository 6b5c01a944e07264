"""kNN smoothing of cold items in a trained recommender, over however many ranks the item table is sharded.

Shapes: V items, U items of a range, N neighbors, C columns of this rank's id rows.
"""

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from llmgr_rec.baselines.knn_smoothing import K_NEIGHBORS, neighbor_weights, smooth_rows
from llmgr_rec.baselines.sparse_scores import best_entries
from llmgr_rec.data.collate import ITEM_ID, Collator
from llmgr_rec.distributed.process_group import World
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.storage.table_io import Shard, local_shards

_LOOKUP_ITEMS = 8192


class KnnSmoothing:
    """The id rows of a trained recommender, smoothed with any strength; see `baselines.knn_smoothing`.

    Where no item has a neighbor, as on a log without words, rows stay as they were trained, those of items without
    clicks, too: there a row of zeros stands before too many others.

    Beside the model a rank holds its own part of the id table once more, as it was trained.

    Args:
        recommender: Sharded or not.
        similarity_VV: Cosines of items by their words, the largest of each item; the same on all ranks.
        train_count_V: Training clicks of each item; those without are nobody's neighbors.
        collator: Makes the bags of items, none of whose ids are left out.
        world: Ranks; all call together.
    """

    @torch.no_grad()
    def __init__(
        self,
        recommender: SessionRecommender,
        similarity_VV: sparse.csr_array,
        train_count_V: Tensor,
        collator: Collator,
        world: World,
    ) -> None:
        self._ids_VN, self._weights_VN = (
            part.to(world.device) for part in nearest_trained(similarity_VV, train_count_V)
        )
        self._has_neighbors = bool(self._weights_VN.any())
        self._train_count_V = train_count_V.to(world.device)
        self._shards = [shard for shard in local_shards(recommender) if shard.table == ITEM_ID]
        self._trained = _look_up(recommender, self._shards, collator, world)

    @torch.no_grad()
    def apply(self, strength: float) -> None:
        """Rewrites the rows from what was trained, whatever strength was applied before.

        Args:
            strength: Clicks that an item's neighbors count for; 0 leaves rows as they were trained.
        """
        for shard, rows_VC in zip(self._shards, self._trained, strict=True):
            first = shard.row_offset
            for own in torch.arange(first, first + shard.tensor.shape[0], device=rows_VC.device).split(_LOOKUP_ITEMS):
                smoothed_UC = rows_VC[own]
                if strength and self._has_neighbors:
                    near_UNC = rows_VC[self._ids_VN[own]]
                    weights_UN, count_U = self._weights_VN[own], self._train_count_V[own]
                    smoothed_UC = smooth_rows(smoothed_UC, near_UNC, weights_UN, count_U, strength)
                shard.tensor[own - first] = smoothed_UC


def nearest_trained(similarity_VV: sparse.csr_array, train_count_V: Tensor) -> tuple[Tensor, Tensor]:
    """The trained items that are most like each item.

    Args:
        similarity_VV: Cosines of items; absent ones are 0.
        train_count_V: Training clicks of each item.

    Returns:
        Items, int64 [V, N], and their weights, float32 [V, N]; 0 where an item has fewer.
    """
    is_trained_V = sparse.diags_array((train_count_V > 0).numpy().astype(np.float32))
    trained_VV = sparse.csr_array(similarity_VV @ is_trained_V)
    trained_VV.eliminate_zeros()
    entries, place = best_entries(trained_VV, K_NEIGHBORS)
    entries, place = entries[place < K_NEIGHBORS], place[place < K_NEIGHBORS]
    rows = np.repeat(np.arange(trained_VV.shape[0]), np.diff(trained_VV.indptr))[entries]
    ids_VN = torch.zeros(trained_VV.shape[0], K_NEIGHBORS, dtype=torch.int64)
    cosines_VN = torch.zeros(trained_VV.shape[0], K_NEIGHBORS)
    ids_VN[rows, place] = torch.from_numpy(trained_VV.indices[entries].astype(np.int64))
    cosines_VN[rows, place] = torch.from_numpy(trained_VV.data[entries].astype(np.float32))
    return ids_VN, neighbor_weights(cosines_VN)


def _look_up(recommender: SessionRecommender, shards: list[Shard], collator: Collator, world: World) -> list[Tensor]:
    """For each shard its columns of all id rows, [V, C].

    A lookup, and not the shard itself: it has all rows however the table is sharded.
    """
    parts: list[list[Tensor]] = [[] for _ in shards]
    for items in torch.arange(collator.num_items).split(_LOOKUP_ITEMS):
        ids_XD = recommender.rows(collator.item_features(items).to(world.device)).ids_XD
        for part, shard in zip(parts, shards, strict=True):
            part.append(ids_XD[:, shard.col_offset : shard.col_offset + shard.tensor.shape[1]].clone())
    return [torch.cat(part) for part in parts]
