"""kNN smoothing of cold items in a trained recommender, whose item table may be sharded across ranks.

Shapes: V items, U items of a chunk, N neighbors, C columns of a shard, D columns of the id table.
"""

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from llmgr_rec.baselines.knn_smoothing import K_NEIGHBORS, neighbor_weights, smooth_rows
from llmgr_rec.baselines.sparse_scores import best_entries
from llmgr_rec.data.collate import ITEM_ID, Collator
from llmgr_rec.distributed.collectives import broadcast_from_rank0
from llmgr_rec.distributed.process_group import World
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.storage.table_io import Shard, local_shards

# Their neighbors' rows are ten times as many.
_LOOKUP_ITEMS = 1024


class KnnSmoothing:
    """Smooths the id rows of a trained recommender with a variable strength; see `baselines.knn_smoothing`.

    If no item of the catalog has a neighbor, as in a data set without texts, all rows keep their trained values, even
    those of items without clicks: a row of zeros would rank before items with negative scores.

    For its shards of the id table, a rank keeps their trained columns of all V rows in memory.

    Args:
        recommender: The trained recommender, sharded or not; `apply` modifies it in place.
        similarity_VV: Cosines of items by their words, the largest of each item; read on rank 0 only.
        train_count_V: Training clicks of each item; items without any are excluded as neighbors.
        collator: Makes the bags of items, without masked ids.
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
        shape = (len(train_count_V), K_NEIGHBORS)
        found = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
        if world.rank == 0:
            found = nearest_trained(similarity_VV, train_count_V)
        self._ids_VN, self._weights_VN = (part.to(world.device) for part in found)
        broadcast_from_rank0(self._ids_VN, world)
        broadcast_from_rank0(self._weights_VN, world)
        self._has_neighbors = bool(self._weights_VN.any())
        self._train_count_V = train_count_V.to(world.device)
        self._shards = [shard for shard in local_shards(recommender) if shard.table == ITEM_ID]
        self._trained = _look_up(recommender, self._shards, collator, world)

    @torch.no_grad()
    def apply(self, strength: float) -> None:
        """Sets the id rows to the trained rows smoothed with a strength; the strength applied before has no effect.

        Args:
            strength: Weight of an item's neighbors, in clicks; 0 restores the trained rows.
        """
        for shard, rows_VC in zip(self._shards, self._trained, strict=True):
            first = shard.row_offset
            for items in torch.arange(first, first + shard.tensor.shape[0], device=rows_VC.device).split(_LOOKUP_ITEMS):
                smoothed_UC = rows_VC[items]
                if strength and self._has_neighbors:
                    neighbors_UNC = rows_VC[self._ids_VN[items]]
                    weights_UN, count_U = self._weights_VN[items], self._train_count_V[items]
                    smoothed_UC = smooth_rows(smoothed_UC, neighbors_UNC, weights_UN, count_U, strength)
                shard.tensor[items - first] = smoothed_UC.to(shard.tensor.dtype)


def nearest_trained(similarity_VV: sparse.csr_array, train_count_V: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest neighbors of each item among the items with training clicks.

    Args:
        similarity_VV: Cosines of items; absent entries are 0.
        train_count_V: Training clicks of each item.

    Returns:
        Indices of the neighbors, int64 [V, N], and their weights, float32 [V, N]; weight 0 fills rows of items with
        fewer neighbors.
    """
    is_trained_V = sparse.diags_array((train_count_V > 0).numpy().astype(np.float32))
    trained_VV = sparse.csr_array(similarity_VV @ is_trained_V)
    trained_VV.eliminate_zeros()
    entries, rows, rank = best_entries(trained_VV, K_NEIGHBORS)
    ids_VN = torch.zeros(trained_VV.shape[0], K_NEIGHBORS, dtype=torch.int64)
    cosines_VN = torch.zeros(trained_VV.shape[0], K_NEIGHBORS)
    ids_VN[rows, rank] = torch.from_numpy(trained_VV.indices[entries].astype(np.int64))
    cosines_VN[rows, rank] = torch.from_numpy(trained_VV.data[entries].astype(np.float32))
    return ids_VN, neighbor_weights(cosines_VN)


def _look_up(recommender: SessionRecommender, shards: list[Shard], collator: Collator, world: World) -> list[Tensor]:
    """The columns of each shard, of all V id rows, [V, C].

    Neighbors may be in shards of other ranks, so the rows are looked up instead of copied from the shard.
    """
    parts: list[list[Tensor]] = [[] for _ in shards]
    for items in torch.arange(collator.num_items).split(_LOOKUP_ITEMS):
        ids_XD = recommender.rows(collator.item_features(items).to(world.device)).ids_XD
        for part, shard in zip(parts, shards, strict=True):
            part.append(ids_XD[:, shard.col_offset : shard.col_offset + shard.tensor.shape[1]].clone())
    return [torch.cat(part) for part in parts]
