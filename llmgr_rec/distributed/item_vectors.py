"""Vectors of the items that a rank ranks: kept in memory, or computed again, block by block, whenever they are needed.

All vectors of a rank are as large as its part of the item table. Where that is much, ranking computes the vectors of a
block of items, scores the queries of many batches against it, and goes on to the next one.

Shapes: R items of this rank, N items of a block, C items of a lookup, Q columns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.distributed.process_group import World

# Vectors of a rank that take more are not kept.
LARGEST_KEPT_BYTES = 512 << 20
# Items of a block whose vectors are computed at a time.
BLOCK_ITEMS = 1 << 16
# Sessions of all ranks together that are ranked in one pass over the blocks.
SESSIONS_PER_PASS = 1 << 13
_FLOAT_BYTES = 4
# Items per call of the model when item vectors are computed.
_CHUNK = 2048


class ItemCollator(Protocol):
    """Part of `Collator` that collates the features of items."""

    num_items: int

    def item_features(self, items_X: Tensor) -> KeyedJaggedTensor:
        """Features of items, one bag per item; see `Collator.item_features`."""


def items_of_rank(num_items: int, world: World) -> range:
    """The items whose vectors and similarities a rank holds while ranks share them.

    Args:
        num_items: Items of the catalog.
        world: This process and the world size.
    """
    return range(num_items * world.rank // world.size, num_items * (world.rank + 1) // world.size)


def keeps_vectors(num_items: int, num_ranks: int, query_width: int) -> bool:
    """Whether ranks that share the items of a catalog keep the vectors of these.

    Args:
        num_items: Items of the catalog.
        num_ranks: Ranks that share them.
        query_width: Columns of an item vector.
    """
    return _FLOAT_BYTES * query_width * -(-num_items // num_ranks) <= LARGEST_KEPT_BYTES


@dataclass(frozen=True)
class ItemVectors:
    """Vectors of some items, ascending.

    Args:
        look_up: Computes the vectors [C, Q] of bags of features. A collective where the tables are sharded.
        collate: Collates the features of items.
        items: Item indices of this rank.
        most_items: Largest number of items of any rank.
        world: This process and the world size.
        kept: All vectors, float32 [R, Q]; None where they are not kept.
    """

    look_up: Callable[[KeyedJaggedTensor], Tensor]
    collate: ItemCollator
    items: range | Tensor
    most_items: int
    world: World
    kept: Tensor | None = None

    @property
    def sessions_at_once(self) -> int:
        """Sessions of a rank that should be compared with the vectors of a block."""
        return 1 if self.kept is not None else max(SESSIONS_PER_PASS // self.world.size, 1)

    def blocks(self) -> Iterator[tuple[range, Tensor]]:
        """Blocks of items, the same number on all ranks, which have to take all of them.

        Yields:
            Places of the items of a block among the items, empty where this rank has no more, and their vectors,
            float32 [N, Q], which the next block overwrites.
        """
        if self.kept is not None:
            yield range(len(self.items)), self.kept
            return
        block_NQ: Tensor | None = None
        for start in range(0, self.most_items, BLOCK_ITEMS):
            places = range(min(start, len(self.items)), min(start + BLOCK_ITEMS, len(self.items)))
            # The first block is the largest.
            out_NQ = None if block_NQ is None else block_NQ[: len(places)]
            vectors_NQ = self._vectors(places, min(BLOCK_ITEMS, self.most_items - start), out_NQ)
            block_NQ = vectors_NQ if block_NQ is None else block_NQ
            yield places, vectors_NQ

    def keep(self, out_RQ: Tensor | None = None) -> "ItemVectors":
        """Computes all vectors. A collective where the tables are sharded.

        Args:
            out_RQ: Where they are written, float32, the first ones first; None allocates memory.
        """
        return replace(self, kept=self._vectors(range(len(self.items)), self.most_items, out_RQ))

    def of_places(self, places: range | Tensor, most_items: int) -> "ItemVectors":
        """Vectors of some of the items.

        Args:
            places: Places of these among the items, ascending.
            most_items: Largest number of them on any rank.
        """
        if isinstance(places, range):
            # A view, which takes no memory.
            items = self.items[places.start : places.stop]
            kept = None if self.kept is None else self.kept[places.start : places.stop]
        else:
            items = torch.arange(self.items.start, self.items.stop) if isinstance(self.items, range) else self.items
            items, kept = items[places], None if self.kept is None else self.kept[places.to(self.kept.device)]
        return replace(self, items=items, most_items=most_items, kept=kept)

    @torch.no_grad()
    def _vectors(self, places: range, most_places: int, vectors_NQ: Tensor | None = None) -> Tensor:
        """Computes vectors in chunks; the number of lookups is equal on all ranks."""
        for start in range(places.start, places.start + most_places, _CHUNK):
            chosen = self.items[start : max(min(start + _CHUNK, places.stop), start)]
            chunk = torch.arange(chosen.start, chosen.stop) if isinstance(chosen, range) else chosen
            # A lookup in sharded tables is a collective, so a rank without items takes part with one that is discarded.
            features = self.collate.item_features(chunk if chunk.numel() else torch.zeros(1, dtype=torch.int64))
            found = self.look_up(features.to(self.world.device))[: chunk.numel()].detach()
            if vectors_NQ is None:
                # Filled in place: joining the chunks would take the memory of all of them twice.
                vectors_NQ = torch.empty(len(places), found.shape[1], device=found.device)
            vectors_NQ[start - places.start : start - places.start + chunk.numel()] = found
        assert vectors_NQ is not None
        return vectors_NQ
