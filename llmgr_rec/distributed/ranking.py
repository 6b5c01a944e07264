"""Exact top-K over a catalog whose item vectors are spread over the ranks: the whole table is never in one place.

Shapes: B sessions of this rank, X = most sessions of any rank, W ranks, Y = W * X, R items of this rank, Q columns of
queries and items, K places, N added terms, P sets of their weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from scipy import sparse
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.baselines.blend import Blend
from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.collate import Collator
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed.collectives import sum_over_ranks
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.kernels.blended_ranks import BlendedScores
from llmgr_rec.kernels.topk import NOT_NUMBERS, merge_top_k, top_k
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender

# Rank of a target that is itself excluded: in no list, however few items there are.
EXCLUDED_RANK = 1 << 30
# Items whose vectors are made at a time.
_CHUNK = 8192
# Stands for "this rank's scores are not numbers" in what the ranks exchange.
_FAILED = -2
# Most scores that are held at once for target ranks.
_SCORES_AT_ONCE = 1 << 22


class RanksItems(Protocol):
    """A model that gives item vectors such that a score is queries @ items.T."""

    def item_vectors(self, features: KeyedJaggedTensor) -> Tensor:
        """Vectors of the items of some bags, [C, Q]."""


class MakesBags(Protocol):
    """Makes the bags of items, as the collator does."""

    num_items: int

    def item_features(self, items_X: Tensor) -> KeyedJaggedTensor:
        """Bags of a list of items."""


@dataclass(frozen=True)
class RankingModel:
    """A model with everything that it needs to rank.

    Args:
        model: Sharded or not.
        collate: Makes its batches, without candidates.
        batch_size: Sessions per batch of one rank.
        blend: Nearest-neighbor scores that are added to the model's; None adds none.
    """

    model: SessionRecommender | LLMGR
    collate: Collator
    batch_size: int
    blend: Blend | None = None

    def queries(self, batch: SessionBatch) -> Tensor:
        """Query of each session of a batch, [B, Q]."""
        if isinstance(self.model, SessionRecommender):
            return self.model.queries(batch)
        queries_BQ: Tensor = self.model(batch)
        return queries_BQ

    def ranker(self, world: World) -> "CatalogRanker":
        """Ranks the catalog with the present weights; all ranks call together."""
        return CatalogRanker(self.model, self.collate, world, self.blend)


class CatalogRanker:
    """Holds the vectors of this rank's range of items and ranks the whole catalog together with the other ranks.

    Args:
        model: Its item vectors are made once, here; sharded models need all ranks to come here together.
        bags: Makes the bags of items.
        world: Ranks.
        blend: Nearest-neighbor scores that are added to the model's; each rank keeps the part of its own items. On all
            ranks or on none.
    """

    def __init__(self, model: RanksItems, bags: MakesBags, world: World, blend: Blend | None = None) -> None:
        self._world = world
        self._num_items = bags.num_items
        first = bags.num_items * world.rank // world.size
        self.items = range(first, bags.num_items * (world.rank + 1) // world.size)
        self._items_RQ = _item_vectors(model, bags, self.items, world)
        self._blend = None if blend is None else blend.of_items(self.items)

    @torch.no_grad()
    def rank(
        self, queries_BQ: Tensor, k: int, exclude: Jagged | None = None, clicks: Jagged | None = None
    ) -> tuple[Tensor, Tensor]:
        """Finds the K best items of each session; all ranks call together, each with its own sessions.

        Args:
            queries_BQ: Queries; the number of sessions may differ between ranks.
            k: Places K; may exceed the number of items.
            exclude: Items that a session must not get, one row a session; on all ranks or on none.
            clicks: What the sessions have clicked, oldest first, for the blend; unused without one.

        Returns:
            Item indices int64 [B, K] and scores float32 [B, K], best first, equal scores by lower index. Where fewer
            than K items are left: -1 and -inf.

        Raises:
            UserError: A score is not a number; raised on every rank.
            ValueError: K is less than 1, or there is a blend and no clicks.
        """
        if self._blend is None:
            return self._rank_with(None, queries_BQ, k, exclude)
        if clicks is None:
            raise ValueError("a ranker with a blend needs the clicks of the sessions")
        return self._rank_with(self.added_by(self._blend, clicks), queries_BQ, k, exclude)

    def added_by(self, blend: Blend, clicks: Jagged) -> sparse.csr_array:
        """Scores that a blend adds to this rank's items, for the sessions of all ranks, [Y, R]; all ranks call together.

        Args:
            blend: Its part for this rank's items.
            clicks: What this rank's sessions have clicked, oldest first.
        """
        if self._world.size == 1:
            return blend.scores(clicks)
        longest = max(_gather_sizes(clicks.num_rows, clicks.offsets.device, self._world))
        return blend.scores(self._gather_lists(clicks, longest))

    @torch.no_grad()
    def target_ranks(
        self,
        queries_BQ: Tensor,
        targets_B: Tensor,
        added_NYR: Sequence[sparse.csr_array] = (),
        weights_PN: Sequence[Sequence[float]] = ((),),
        exclude: Jagged | None = None,
    ) -> Tensor:
        """Number of items that rank before each target, int64 [P, B], on the CPU; all ranks call together.

        An excluded target has `EXCLUDED_RANK`. Rows without a target (-1) have an arbitrary rank.

        Args:
            queries_BQ: Queries.
            targets_B: The item that was clicked next.
            added_NYR: Scores added to this rank's items, from `added_by`.
            weights_PN: Weights of the added scores; each set gives ranks of its own.
            exclude: Items that a session must not get; on all ranks or on none.

        Raises:
            UserError: A score is not a number; raised on every rank.
        """
        queries, targets, own = queries_BQ.detach().float(), targets_B, slice(None)
        if self._world.size > 1:
            longest = max(_gather_sizes(queries.shape[0], queries.device, self._world))
            own = slice(self._world.rank * longest, self._world.rank * longest + queries.shape[0])
            queries = _gather(_pad_rows(queries, longest), self._world).flatten(0, 1)
            targets = _gather(_pad_rows(targets, longest), self._world).flatten()
            exclude = None if exclude is None else self._gather_lists(exclude, longest)
        rows = max(_SCORES_AT_ONCE // -(-self._num_items // self._world.size), 1)
        found = []
        for start in range(0, queries.shape[0], rows):
            block = slice(start, start + rows)
            left_out = None if exclude is None else exclude.narrow(start, min(start + rows, queries.shape[0]))
            added = [added_YR[block] for added_YR in added_NYR]
            found.append(self._target_ranks_of_block(queries[block], targets[block], added, weights_PN, left_out))
        return torch.cat(found, dim=1)[:, own] if found else torch.empty(len(weights_PN), 0, dtype=torch.int64)

    def _target_ranks_of_block(
        self,
        queries: Tensor,
        targets: Tensor,
        added: Sequence[sparse.csr_array],
        weights_PN: Sequence[Sequence[float]],
        exclude: Jagged | None,
    ) -> Tensor:
        scores = queries @ self._items_RQ.T
        if exclude is not None:
            columns = exclude.values - self.items.start
            inside = (columns >= 0) & (columns < len(self.items))
            scores[exclude.row_of_value[inside], columns[inside]] = float("-inf")
        blended = BlendedScores(scores.cpu().numpy(), added, targets.cpu().numpy(), weights_PN, self.items.start)
        # One rank holds a target, the others add 0; or NaN, so that all learn of it together.
        own = sum_over_ranks(torch.from_numpy(blended.target_scores()), self._world)
        if own.isnan().any():
            raise UserError(NOT_NUMBERS)
        before = sum_over_ranks(torch.from_numpy(blended.count_ahead(own.numpy())), self._world)
        return torch.where(own.isneginf(), EXCLUDED_RANK, before)

    def _rank_with(
        self, added_YR: sparse.csr_array | None, queries_BQ: Tensor, k: int, exclude: Jagged | None
    ) -> tuple[Tensor, Tensor]:
        if k < 1:
            raise ValueError(f"k is {k}; at least 1 item must be asked for")
        queries = queries_BQ.detach().float()
        if self._world.size == 1:
            return top_k(queries, self._items_RQ, k, exclude, added_YR)
        sizes = _gather_sizes(queries.shape[0], queries.device, self._world)
        longest = max(sizes)
        queries_WXQ = _gather(_pad_rows(queries, longest), self._world)
        excluded = None if exclude is None else self._gather_lists(exclude, longest)
        ids, scores = self._own_top_k(queries_WXQ.flatten(0, 1), k, excluded, added_YR)
        # What this rank found for the sessions of each other rank goes back to that rank.
        ids_WXK = _exchange(ids.view(self._world.size, longest, k))
        scores_WXK = _exchange(scores.view(self._world.size, longest, k))
        if (ids_WXK == _FAILED).any():
            raise UserError(NOT_NUMBERS)
        ids_BK, scores_BK = merge_top_k(ids_WXK, scores_WXK, k)
        return ids_BK[: queries.shape[0]], scores_BK[: queries.shape[0]]

    def _own_top_k(
        self, queries: Tensor, k: int, exclude: Jagged | None, added_YR: sparse.csr_array | None
    ) -> tuple[Tensor, Tensor]:
        if exclude is not None:
            exclude = Jagged(exclude.values - self.items.start, exclude.offsets)
        try:
            ids, scores = top_k(queries, self._items_RQ, k, exclude, added_YR)
        except UserError:
            # The other ranks wait for this one's lists; all learn of it together.
            return (
                queries.new_full((queries.shape[0], k), _FAILED, dtype=torch.int64),
                queries.new_zeros(queries.shape[0], k),
            )
        return torch.where(ids >= 0, ids + self.items.start, ids), scores

    def _gather_lists(self, lists: Jagged, longest: int) -> Jagged:
        """The lists of all ranks, each rank's padded with empty ones to the same number."""
        lengths_WX = _gather(_pad_rows(lists.lengths, longest), self._world)
        sizes = lengths_WX.sum(dim=1).tolist()
        values_WY = _gather(_pad_rows(lists.values, max(sizes)), self._world)
        values = torch.cat([row[:size] for row, size in zip(values_WY, sizes, strict=True)])
        return Jagged.from_lengths(values, lengths_WX.flatten())


@torch.no_grad()
def _item_vectors(model: RanksItems, bags: MakesBags, items: range, world: World) -> Tensor:
    """Vectors of a range of items, chunk by chunk, with the same number of lookups on every rank."""
    longest = -(-bags.num_items // world.size)
    chunks = []
    for start in range(items.start, items.start + longest, _CHUNK):
        wanted = torch.arange(start, max(min(start + _CHUNK, items.stop), start))
        # A rank whose range is shorter still takes part in the lookup, with a bag that is thrown away.
        features = bags.item_features(wanted if wanted.numel() else torch.zeros(1, dtype=torch.int64))
        chunks.append(model.item_vectors(features.to(world.device))[: wanted.numel()].detach().float())
    return torch.cat(chunks).contiguous()


def _gather_sizes(size: int, device: torch.device, world: World) -> list[int]:
    return _gather(torch.tensor([size], device=device), world).flatten().tolist()


def _gather(values: Tensor, world: World) -> Tensor:
    """Equal-shaped tensors of all ranks, stacked in rank order."""
    gathered = values.new_empty(world.size, *values.shape)
    dist.all_gather(list(gathered.unbind()), values.contiguous())
    return gathered


def _exchange(parts_WXK: Tensor) -> Tensor:
    """Part w goes to rank w; returns what every rank sent here, in rank order."""
    received = torch.empty_like(parts_WXK)
    dist.all_to_all_single(received, parts_WXK.contiguous())
    return received


def _pad_rows(values: Tensor, rows: int) -> Tensor:
    padded = values.new_zeros(rows, *values.shape[1:])
    padded[: values.shape[0]] = values
    return padded
