"""Draws the id rows of rare items towards those of like texts, over however many ranks hold the item table.

Shapes: V items, U items of a range, N neighbours, K columns of the text tower, C columns of this rank's id rows.
"""

import torch
from torch import Tensor

from llmgr_rec.data.collate import Collator
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.reduce import sum_over_ranks
from llmgr_rec.distributed.shards import Shard, local_shards
from llmgr_rec.modules.item_tables import ITEM_ID
from llmgr_rec.modules.rare_rows import NEIGHBOURS, draw_to_neighbours, text_neighbours
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.modules.text_tower import TextTower

_LOOKUP_ITEMS = 8192
# Cosines that are held at once while neighbours are looked for.
_PAIRS = 2**24


@torch.no_grad()
def draw_rare_rows(
    recommender: SessionRecommender, train_count_V: Tensor, clicks: float, collator: Collator, world: World
) -> None:
    """Rewrites the id rows of a trained recommender; see `llmgr_rec.modules.rare_rows`.

    Work grows with the square of the catalogue, dealt out over the ranks. Beside the model a rank holds the tower's
    vectors of all items and its own part of the id table once more.

    Args:
        recommender: With a trained text tower; sharded or not.
        train_count_V: Training clicks of each item.
        clicks: Clicks that an item's neighbours count for, above 0.
        collator: Makes the bags of items, none of whose ids are left out.
        world: Ranks; all call together.

    Raises:
        ValueError: There is no text tower.
    """
    tower = recommender.text_tower
    if tower is None:
        raise ValueError("the recommender was built without a text tower")
    train_count_V = train_count_V.to(world.device)
    shards = [shard for shard in local_shards(recommender) if shard.table == ITEM_ID]
    items_VK, rows_VC_of_shards = _look_up(recommender, tower, shards, collator, world)
    ids_VN, weights_VN = _neighbours(items_VK, train_count_V > 0, float(tower.log_scale.exp()), world)
    for shard, rows_VC in zip(shards, rows_VC_of_shards, strict=True):
        first = shard.row_offset
        for own in torch.arange(first, first + shard.tensor.shape[0], device=world.device).split(_LOOKUP_ITEMS):
            near_UNC = rows_VC[ids_VN[own]]
            shard.tensor[own - first] = draw_to_neighbours(
                rows_VC[own], near_UNC, weights_VN[own], train_count_V[own], clicks
            )


def _look_up(
    recommender: SessionRecommender, tower: TextTower, shards: list[Shard], collator: Collator, world: World
) -> tuple[Tensor, list[Tensor]]:
    """The tower's vectors of all items, [V, K], and for each shard its columns of all id rows, [V, C].

    A lookup, and not the shard itself: it has all rows however the table is cut.
    """
    vectors: list[Tensor] = []
    parts: list[list[Tensor]] = [[] for _ in shards]
    for items in torch.arange(collator.num_items).split(_LOOKUP_ITEMS):
        rows = recommender.rows(collator.item_features(items).to(world.device))
        if rows.texts_XH is None:
            raise ValueError("the recommender was built without item text")
        vectors.append(tower.items(rows.texts_XH))
        for part, shard in zip(parts, shards, strict=True):
            part.append(rows.ids_XD[:, shard.col_offset : shard.col_offset + shard.tensor.shape[1]].clone())
    return torch.cat(vectors), [torch.cat(part) for part in parts]


def _neighbours(items_VK: Tensor, trained_V: Tensor, scale: float, world: World) -> tuple[Tensor, Tensor]:
    """Neighbours of all items and their weights, [V, N] each; found in ranges that do not depend on the ranks."""
    num_items = items_VK.shape[0]
    shape = (num_items, min(NEIGHBOURS, num_items))
    ids_VN = torch.zeros(shape, dtype=torch.int64, device=items_VK.device)
    weights_VN = torch.zeros(shape, device=items_VK.device)
    size = max(1, _PAIRS // num_items)
    for number, start in enumerate(range(0, num_items, size)):
        if number % world.size == world.rank:
            own = range(start, min(start + size, num_items))
            ids_VN[own.start : own.stop], weights_VN[own.start : own.stop] = text_neighbours(
                items_VK, trained_V, scale, own
            )
    return sum_over_ranks(ids_VN, world), sum_over_ranks(weights_VN, world)
