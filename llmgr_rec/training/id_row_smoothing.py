"""kNN smoothing of cold items in a trained recommender, whose item table may be sharded across ranks.

The columns of a row are smoothed independently of each other, so the table is smoothed in place, a strip of columns at
a time. A copy of the trained columns is kept in a temporary file.

Shapes: V items, R rows of a shard, U items of a block, N neighbors, W columns of a strip.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import torch
import torch.distributed as dist
from scipy import sparse
from torch import Tensor

from llmgr_rec.baselines.knn_smoothing import K_NEIGHBORS, neighbor_weights, smooth_rows
from llmgr_rec.baselines.sparse_scores import best_entries, nearest
from llmgr_rec.data.collate import ITEM_ID
from llmgr_rec.distributed.collectives import gather_from_ranks, sum_over_ranks
from llmgr_rec.distributed.item_vectors import items_of_rank
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.sparse_exchange import pass_on
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.storage.table_io import Shard, local_rows, local_shards

# Memory for the neighbors' rows of the items that are smoothed at a time, of which there are two copies.
_BLOCK_BYTES = 1 << 22
# Memory for a strip, which has at least 4 columns.
STRIP_BYTES = 1 << 28


class KnnSmoothing:
    """Smooths the id rows of a trained recommender with a variable strength; see `baselines.knn_smoothing`.

    If no item of the catalog has a neighbor, as in a data set without texts, all rows keep their trained values, even
    those of items without clicks: a row of zeros would rank before items with negative scores.

    Each rank has the neighbors of its items (`items_of_rank`) in memory.

    Args:
        recommender: The trained recommender, sharded or not; `apply` modifies it in place.
        similarity_VR: Cosines of all items (rows) and this rank's (columns) by their words, the largest of each item.
        train_count_V: Training clicks of each item; items without any are excluded as neighbors.
        world: Ranks; all call together.
        folder: Folder of the temporary file, on this machine; None takes that of the system.
    """

    @torch.no_grad()
    def __init__(
        self,
        recommender: SessionRecommender,
        similarity_VR: sparse.csr_array,
        train_count_V: Tensor,
        world: World,
        folder: Path | None = None,
    ) -> None:
        self._world, self._folder = world, folder
        self._train_count_V = train_count_V
        self._neighbors = nearest_trained(similarity_VR, train_count_V, world)
        has_neighbors = torch.tensor([self._neighbors.nnz])
        self._has_neighbors = bool(sum_over_ranks(has_neighbors, world))
        self._table = _SharedTable.of(recommender, world)
        self._trained: IO[bytes] | None = None
        self._strength = 0.0

    @torch.no_grad()
    def apply(self, strength: float) -> None:
        """Sets the id rows to the trained rows smoothed with a strength; the strength applied before has no effect.

        Args:
            strength: Weight of an item's neighbors, in clicks; 0 restores the trained rows.
        """
        if strength == self._strength or not self._has_neighbors:
            return
        first = self._trained is None
        if self._trained is None:
            # Open as long as this object: it has the trained rows.
            self._trained = TemporaryFile(dir=self._folder)  # noqa: SIM115
            weakref.finalize(self, self._trained.close)
        self._trained.seek(0)
        for strip in self._table.strips():
            local = self._table.local(strip)
            if first:
                self._trained.write(local.contiguous().cpu().view(torch.uint8).numpy().data)
            elif local.numel():
                stored = self._trained.read(local.numel() * local.element_size())
                local.copy_(torch.frombuffer(bytearray(stored), dtype=local.dtype).view(local.shape))
            if strength:
                self._smooth(strip, strength)
        self._strength = strength

    def _smooth(self, strip: "_Strip", strength: float) -> None:
        """Smooths the columns of a strip, which have their trained values."""
        trained_VW = self._table.whole(strip)
        num_items, block_items = len(self._train_count_V), self._table.items_of_block(K_NEIGHBORS)
        for owner in range(self._world.size):
            items = items_of_rank(num_items, replace(self._world, rank=owner))
            for start in range(items.start, items.stop, block_items):
                block = range(start, min(start + block_items, items.stop))
                ids_UN, weights_UN = self._neighbors_of(block, owner, items.start)
                if trained_VW is None:
                    continue
                ids_UN, weights_UN = ids_UN.to(trained_VW.device), weights_UN.to(trained_VW.device)
                count_U = self._train_count_V[block.start : block.stop].to(trained_VW.device)
                rows_UW = trained_VW[block.start : block.stop]
                smoothed_UW = smooth_rows(rows_UW, trained_VW[ids_UN], weights_UN, count_U, strength)
                self._table.write(strip, block, smoothed_UW)

    def _neighbors_of(self, block: range, owner: int, first_item: int) -> tuple[Tensor, Tensor]:
        """Ids and weights of the neighbors of some items of a rank, on all ranks."""
        shape = (len(block), K_NEIGHBORS)
        found = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
        if owner == self._world.rank:
            rows = slice(block.start - first_item, block.stop - first_item)
            found = _neighbor_lists(self._neighbors[rows])
        if self._world.size > 1:
            for part in found:
                dist.broadcast(part, owner)
        return found[0].long(), found[1]


def nearest_trained(similarity_VR: sparse.csr_array, train_count_V: Tensor, world: World) -> sparse.csr_array:
    """The cosines of this rank's items and their nearest neighbors among the items with training clicks.

    Args:
        similarity_VR: Cosines of all items (rows) and this rank's (columns); absent entries are 0.
        train_count_V: Training clicks of each item.
        world: Ranks; all call together.

    Returns:
        Sparse matrix of this rank's items (rows) and all items (columns), float32, with at most `K_NEIGHBORS` entries a
        row.
    """
    num_items = similarity_VR.shape[0]
    own = items_of_rank(num_items, world)
    is_trained_R = train_count_V[own.start : own.stop].numpy() > 0

    def for_rank(rank: int) -> sparse.csr_array:
        items = items_of_rank(num_items, replace(world, rank=rank))
        rows = sparse.csr_array(similarity_VR[items.start : items.stop])
        rows.data *= is_trained_R[rows.indices]
        rows.eliminate_zeros()
        kept = nearest(rows, K_NEIGHBORS)
        return sparse.csr_array((kept.data, kept.indices + own.start, kept.indptr), shape=(len(items), num_items))

    found = for_rank(world.rank)
    for step in range(1, world.size):
        to, source = (world.rank + step) % world.size, (world.rank - step) % world.size
        found = nearest(sparse.csr_array(found + pass_on(for_rank(to), to, source, None)), K_NEIGHBORS)
    return found


def _neighbor_lists(cosines_UV: sparse.csr_array) -> tuple[Tensor, Tensor]:
    """Indices of the neighbors, int32 [U, N], and their weights, float32 [U, N]; weight 0 where there are fewer."""
    entries, rows, rank = best_entries(cosines_UV, K_NEIGHBORS)
    ids_UN = torch.zeros(cosines_UV.shape[0], K_NEIGHBORS, dtype=torch.int32)
    cosines_UN = torch.zeros(cosines_UV.shape[0], K_NEIGHBORS)
    ids_UN[rows, rank] = torch.from_numpy(cosines_UV.indices[entries].astype(np.int32))
    cosines_UN[rows, rank] = torch.from_numpy(cosines_UV.data[entries].astype(np.float32))
    return ids_UN, neighbor_weights(cosines_UN)


@dataclass(frozen=True)
class _Strip:
    """Columns of a shard; or, if the table is sharded by rows, of all shards.

    Args:
        columns: Columns of the table.
        shard: This rank's shard with them; None if it has none.
    """

    columns: range
    shard: Shard | None


@dataclass(frozen=True)
class _SharedTable:
    """The table of ids.

    Args:
        shards: This rank's shards.
        num_rows: Number of rows.
        dim: Number of columns.
        edges: Columns at which shards of any rank begin or end, ascending, if a shard has some of the rows only; else
            empty.
        num_strips: Number of strips of the rank with most.
        world: Ranks.
    """

    shards: list[Shard]
    num_rows: int
    dim: int
    edges: list[int]
    num_strips: int
    world: World

    @classmethod
    def of(cls, recommender: SessionRecommender, world: World) -> "_SharedTable":
        """The table of a recommender; all ranks call together."""
        shards = [shard for shard in local_shards(recommender) if shard.table == ITEM_ID]
        held = [(shard.num_rows, shard.dim, shard.col_offset, tuple(shard.tensor.shape)) for shard in shards]
        found = [one for of_rank in gather_from_ranks(held, world) for one in of_rank]
        num_rows, dim, *_ = found[0]
        edges = {edge for _, _, first, (_, columns) in found for edge in (first, first + columns)}
        is_split = any(rows < num_rows for *_, (rows, _) in found)
        table = cls(shards, num_rows, dim, sorted(edges) if is_split else [], 0, world)
        return replace(table, num_strips=max(gather_from_ranks(len(table._own_strips()), world)))

    def strips(self) -> Iterator[_Strip]:
        """This rank's strips, as many as those of any rank."""
        own = self._own_strips()
        yield from own
        for _ in range(self.num_strips - len(own)):
            yield _Strip(range(0), None)

    def items_of_block(self, num_neighbors: int) -> int:
        """Items whose neighbors' rows of a strip fit into `_BLOCK_BYTES`; the same number on all ranks.

        Args:
            num_neighbors: Neighbors of an item.
        """
        return max(_BLOCK_BYTES // (4 * num_neighbors * min(self._strip_width, self.dim)), 1)

    @property
    def _strip_width(self) -> int:
        return max(STRIP_BYTES // (16 * self.num_rows) * 4, 4)

    def _own_strips(self) -> list[_Strip]:
        width = self._strip_width
        if self.edges:
            return [
                _Strip(columns := range(start, min(start + width, last)), self._shard_of(columns))
                for first, last in pairwise(self.edges)
                for start in range(first, last, width)
            ]
        return [
            _Strip(range(start, min(start + width, shard.col_offset + shard.tensor.shape[1])), shard)
            for shard in self.shards
            for start in range(shard.col_offset, shard.col_offset + shard.tensor.shape[1], width)
        ]

    def _shard_of(self, columns: range) -> Shard | None:
        """This rank's shard that has some columns of some rows."""
        ends = ((shard, shard.col_offset + shard.tensor.shape[1]) for shard in self.shards)
        return next((one for one, end in ends if one.col_offset <= columns.start and columns.stop <= end), None)

    def local(self, strip: _Strip) -> Tensor:
        """The columns of a strip in this rank's shard, [R, W]; shares memory with the table."""
        if strip.shard is None:
            return torch.empty(0, len(strip.columns))
        first = strip.columns.start - strip.shard.col_offset
        return strip.shard.tensor[:, first : first + len(strip.columns)]

    def whole(self, strip: _Strip) -> Tensor | None:
        """A copy of a strip with all rows, float32 [V, W]; None if this rank has none of its columns to write."""
        local_RW = self.local(strip)
        if not self.edges:
            return None if strip.shard is None else local_RW.to(torch.float32, copy=True)
        whole_VW = torch.zeros(self.num_rows, len(strip.columns), device=self.world.device)
        if strip.shard is not None:
            first = strip.shard.row_offset
            whole_VW[first : first + len(local_RW)] = local_RW
        return sum_over_ranks(whole_VW, self.world)

    def write(self, strip: _Strip, items: range, values_UW: Tensor) -> None:
        """Writes rows of a strip; those of other ranks' shards are ignored."""
        if strip.shard is None:
            return
        rows = local_rows(strip.shard, items.start, items.stop)
        first = strip.shard.row_offset
        self.local(strip)[rows.start - first : rows.stop - first] = values_UW[
            rows.start - items.start : rows.stop - items.start
        ]
