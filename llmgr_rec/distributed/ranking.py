"""Exact top-K and target ranks over a catalog whose item vectors are sharded across ranks by item.

Each rank scores the sessions of all ranks against its own items. The top-K lists are then merged by the rank of each
session, and the counts for target ranks are summed over ranks.

Shapes: B sessions of this rank, X maximum number of sessions of any rank, W ranks, Y = W * X sessions of all ranks with
padding, R items of this rank, Q width of queries and item vectors, K length of a ranked list, N blend terms, P sets of
their weights.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.baselines.blend import Blend
from llmgr_rec.baselines.reranker import DEPTH, Reranker
from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.collate import Collator
from llmgr_rec.data.domains import ItemDomains
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed.collectives import sum_over_ranks
from llmgr_rec.distributed.item_vectors import (
    ItemCollator,
    ItemVectors,
    items_of_rank,
    keeps_vectors,
)
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.kernels.batch_scan import BatchScan
from llmgr_rec.kernels.blended_ranks import BlendedScores
from llmgr_rec.kernels.item_index import ItemIndex
from llmgr_rec.kernels.item_scan import ItemScan, can_search
from llmgr_rec.kernels.topk import NOT_NUMBERS, TopKSearch, merge_top_k, top_k
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.model_spec import query_width
from llmgr_rec.modules.query_encoder import MeasuredItems, QueryEncoder, QueryItems
from llmgr_rec.modules.recommender import SessionRecommender

# Target rank of an excluded target: beyond the end of any list.
EXCLUDED_RANK = 1 << 30
# Item index in the lists of a rank that has a NaN score.
_FAILED = -2
# A scan reads the items for each session, a product for all of them at once: items of the catalog for which a scan of
# one more session takes less time, and maximum number of sessions.
_ITEMS_PER_SCANNED_SESSION = 1 << 15
_MAX_SCANNED_SESSIONS = 16
# A choice of fewer than one in so many items is ranked without the others.
_FEW_CHOSEN = 8
# Maximum number of scores in memory while target ranks are computed.
_MAX_SCORES = 1 << 21


class ItemVectorModel(Protocol):
    """A model whose score of a session and an item is the dot product of a query and an item vector."""

    def item_vectors(self, features: KeyedJaggedTensor) -> Tensor:
        """Item vectors, [C, Q], of C bags of features."""


@dataclass(frozen=True)
class RankingModel:
    """A model with its collator, batch size and blend: all that ranking needs.

    Args:
        model: The model, sharded or not.
        collate: Collator for batches without candidates.
        batch_size: Sessions per batch of one rank.
        blend: Nearest-neighbor scores that are added to the model's scores; None for no blend.
        query_encoder: Encodes the sessions in place of the model; see `with_query_encoder`.
        is_replicated: Whether each rank has the whole model. Ranking is then no collective.
        domains: Domains of the items: a list has items of the domain of its session only. None ranks the whole catalog.
        keeps_tables: Whether the model needs its tables after `ranker`. Otherwise item vectors may take their place,
            and sessions are encoded by `with_query_encoder`.
        reranker: Ranks the best items of each list again; None keeps the order of the blend.
    """

    model: SessionRecommender | LLMGR
    collate: Collator
    batch_size: int
    blend: Blend | None = None
    query_encoder: QueryEncoder | None = None
    is_replicated: bool = False
    domains: ItemDomains | None = None
    keeps_tables: bool = True
    reranker: Reranker | None = None

    def with_query_encoder(self, ranker: "CatalogRanker") -> "RankingModel":
        """The same model in a form that encodes sessions faster while its weights do not change, where it has one.

        The collator of the result makes batches that only the result can encode.

        Args:
            ranker: From `ranker`, with the present weights.
        """
        if not isinstance(self.model, SessionRecommender) or ranker.query_items is None:
            return self
        if not self.keeps_tables:
            self.model.item_tables.free()
        query_encoder = QueryEncoder(self.model, ranker.query_items)
        return replace(self, collate=self.collate.without_features(), query_encoder=query_encoder)

    def queries(self, batch: SessionBatch) -> Tensor:
        """Computes the query of each session of a batch, [B, Q]."""
        if self.query_encoder is not None:
            return self.query_encoder.queries(batch.graph)
        if isinstance(self.model, SessionRecommender):
            return self.model.queries(batch)
        queries_BQ: Tensor = self.model(batch)
        return queries_BQ

    def score_parts(self, queries_BQ: Tensor, items_KQ: Tensor) -> dict[str, Tensor]:
        """The parts of the model's scores: those of the encoder and, where there are, of language models.

        Args:
            queries_BQ: Queries.
            items_KQ: Item vectors.

        Returns:
            Scores by part, float64 [B, K]; they add up to queries_BQ @ items_KQ.T.
        """
        columns = self.model.score_columns
        splits = zip(
            *(side.double().split(list(columns.values()), dim=1) for side in (queries_BQ, items_KQ)), strict=True
        )
        return {name: queries @ items.T for name, (queries, items) in zip(columns, splits, strict=True)}

    def ranker(self, world: World, keep: bool = False) -> "CatalogRanker":
        """A ranker with the current weights, which must not change while it is used. All ranks must call it.

        It keeps all item vectors, unless these are large (`keeps_vectors`) and the model keeps its tables beside them.

        Args:
            world: This process and the world size.
            keep: Whether the item vectors are kept in any case.
        """
        ranks = World.alone(world.device) if self.is_replicated else world
        encodes_queries = ranks.size == 1 and isinstance(self.model, SessionRecommender) and not self.model.text_encoder
        keep |= keeps_vectors(self.collate.num_items, ranks.size, query_width(self.model))
        keep |= encodes_queries and not self.keeps_tables
        if not (keep and encodes_queries):
            return CatalogRanker(self.model, self.collate, ranks, self.blend, self.domains, self.reranker, keep)
        assert isinstance(self.model, SessionRecommender)
        measured = MeasuredItems(self.model, self.collate.num_items)
        # The vector of an item is made of its own row of ids, so it can take the place of the row.
        out = None if self.keeps_tables else self.model.item_tables.id_table()
        ranker = CatalogRanker(measured, self.collate, ranks, self.blend, self.domains, self.reranker, out_RQ=out)
        ranker.query_items = QueryItems(ranker.item_vectors, measured.lengths())
        return ranker


class CatalogRanker:
    """Ranks the whole catalog for sessions. Each rank ranks a contiguous range of items.

    The constructor computes the item vectors, if they are kept. It and all methods are collectives: all ranks must call
    them.

    Args:
        model: Computes the item vectors.
        collate: Collates the features of items.
        world: This process and the world size.
        blend: Nearest-neighbor scores that are added to the model's scores; each rank stores those of its own items.
            Must be given on all ranks or on none.
        domains: Domains of the items. A session then gets items of the domain of its newest click only.
        reranker: Ranks the best items of each list again; with one rank only.
        out_RQ: Where the item vectors are written if they are kept; see `ItemVectors.keep`.
        keep: Whether the item vectors are kept. Otherwise each call of `rank` computes them once, each of
            `target_ranks` twice, and the model must be in the same mode as for the queries.

    Raises:
        UserError: There are a re-ranker and several ranks that share the items.
    """

    def __init__(
        self,
        model: ItemVectorModel,
        collate: ItemCollator,
        world: World,
        blend: Blend | None = None,
        domains: ItemDomains | None = None,
        reranker: Reranker | None = None,
        keep: bool = True,
        out_RQ: Tensor | None = None,
    ) -> None:
        if reranker is not None and world.size > 1:
            raise UserError(
                "ranks that share the tables of a model cannot rank with its trees (blend.reranker); start one rank, "
                "raise tables.memory_per_rank_gb, or train with blend.reranker none"
            )
        self._reranker = reranker
        self._world = world
        self._num_items = collate.num_items
        self.items = items_of_rank(collate.num_items, world)
        most_items = -(-collate.num_items // world.size)
        vectors = ItemVectors(model.item_vectors, collate, self.items, most_items, world)
        self._vectors = vectors.keep(out_RQ) if keep else vectors
        # What sessions are encoded from; None where this rank does not know it.
        self.query_items: QueryItems | None = None
        self._blend = None if blend is None else blend.of_items(self.items)
        self._scan: ItemScan | ItemIndex | None = None
        self._is_allowed_R: NDArray[np.bool_] | None = None
        # A choice of items and their vectors.
        self._chosen_R: Tensor | None = None
        self._chosen_RQ: Tensor | None = None
        self._domains = domains
        # Indices of the items of each domain, and a ranker of them whose item indices are places among these.
        self._of_domain: dict[int, tuple[Tensor, CatalogRanker]] = {}

    @property
    def needs_clicks(self) -> bool:
        """Whether `rank` needs the clicks of the sessions."""
        return self._blend is not None or self._domains is not None

    @property
    def item_vectors(self) -> Tensor:
        """Vectors of this rank's items, float32 [R, Q].

        Raises:
            ValueError: They are not kept.
        """
        if self._vectors.kept is None:
            raise ValueError("the vectors of the items are not kept; make the ranker with keep=True")
        return self._vectors.kept

    @property
    def sessions_at_once(self) -> int:
        """Sessions of a rank that should be ranked by one call: several batches, where item vectors are not kept."""
        return self._vectors.sessions_at_once

    def prepare_for_few_sessions(self) -> None:
        """Prepares to rank single sessions, or a few, in less time; see `ItemScan`. In a single process on a CPU only.

        Later scores of few sessions may differ by rounding from those of many sessions.
        """
        if self._world.size == 1:
            self._scan = ItemScan.fastest(self.item_vectors)
            self._of_domain = {}

    def prepare_index(self, samples_SQ: Tensor, recall: float) -> float | None:
        """Ranks few sessions approximately from now on; after `prepare_for_few_sessions`.

        Args:
            samples_SQ: Queries like those to come, [S, Q].
            recall: Wanted share of the best 20 items of a query.

        Returns:
            Share that is found for the sample queries; None if all is ranked exactly.

        Raises:
            UserError: faiss is not installed.
        """
        if not isinstance(self._scan, ItemScan):
            return None
        samples = samples_SQ.detach().float()
        index = ItemIndex(self.item_vectors, self._scan, samples[[can_search(query_Q) for query_Q in samples]], recall)
        if not index.is_used:
            return None
        self._scan = index
        return index.recall

    def among(self, items_R: Tensor) -> "CatalogRanker":
        """A ranker of some of the items, which shares nothing that either changes. In a single process only.

        Args:
            items_R: Item indices, ascending, int64.

        Raises:
            ValueError: There are several ranks.
        """
        if self._world.size > 1:
            raise ValueError("a choice of items is ranked in a single process only")
        chosen = copy.copy(self)
        chosen._chosen_R, chosen._chosen_RQ, chosen._of_domain = items_R, None, {}
        if _FEW_CHOSEN * len(items_R) < self._num_items:
            chosen._scan = None
        elif self._scan is not None:
            chosen._is_allowed_R = np.zeros(self._num_items, bool)
            chosen._is_allowed_R[items_R.numpy()] = True
        return chosen

    def over_all(self) -> "CatalogRanker":
        """A ranker of the items of all domains, which shares nothing that either changes."""
        ranker = copy.copy(self)
        ranker._domains = None
        return ranker

    @torch.no_grad()
    def rank(
        self, queries_BQ: Tensor, k: int, exclude: Jagged | None = None, clicks: Jagged | None = None
    ) -> tuple[Tensor, Tensor]:
        """Finds the K best items for each session of this rank.

        Args:
            queries_BQ: Queries; the number of sessions may differ between ranks.
            k: Length K of a list; may exceed the number of items.
            exclude: Item indices that must not be in a session's list, one row per session; on all ranks or on none.
            clicks: Clicked item indices of each session, oldest first; required if `needs_clicks`, else unused.

        Returns:
            Item indices, int64 [B, K], and scores, float32 [B, K], best first; ties are in order of item index. Lists
            with fewer than K items are padded with index -1 and score -inf.

        Raises:
            UserError: A score is NaN; raised on every rank.
            ValueError: K is less than 1, or the clicks are needed and missing.
        """
        if self.needs_clicks and clicks is None:
            raise ValueError("a ranker with a blend or with domains needs the clicks of the sessions")
        if self._reranker is None or clicks is None or k < 1:
            return self._rank(queries_BQ, k, exclude, clicks)
        # Deep enough for the trees, so that a shorter list is the beginning of a longer one.
        ids_BK, scores_BK = self._reranker.rerank(*self._rank(queries_BQ, max(k, DEPTH), exclude, clicks), clicks)
        return ids_BK[:, :k], scores_BK[:, :k]

    def _rank(self, queries_BQ: Tensor, k: int, exclude: Jagged | None, clicks: Jagged | None) -> tuple[Tensor, Tensor]:
        """The best items by the model and the blend; see `rank`."""
        if self._domains is not None and clicks is not None and k >= 1:
            return self._rank_by_domain(self._domains.of_sessions(clicks), queries_BQ, k, exclude, clicks)
        if k >= 1 and self._scans(queries_BQ):
            return self._scanned(queries_BQ, k, exclude, clicks)
        if k < 1:
            raise ValueError(f"k is {k}; it must be 1 or more")
        queries = queries_BQ.detach().float()
        if self._chosen_R is not None:
            return self._top_k_of_chosen(self._chosen_R, queries, k, exclude, clicks)
        if self._world.size == 1:
            return self._top_k(queries, k, exclude, clicks)
        return self._rank_by_all_ranks(queries, k, exclude, None if self._blend is None else clicks)

    def _rank_by_domain(
        self, domains_B: Tensor, queries_BQ: Tensor, k: int, exclude: Jagged | None, clicks: Jagged
    ) -> tuple[Tensor, Tensor]:
        """Ranks the sessions of each domain among its items; a session without a domain gets an empty list."""
        assert self._domains is not None
        counts = torch.bincount(domains_B.long() + 1, minlength=len(self._domains.names) + 1)[1:].double()
        ids_BK = torch.full((len(domains_B), k), -1, device=queries_BQ.device)
        scores_BK = torch.full((len(domains_B), k), float("-inf"), device=queries_BQ.device)
        # Of all ranks, because all have to rank the same domains.
        for domain in sum_over_ranks(counts, self._world).nonzero().squeeze(1).tolist():
            rows = (domains_B == domain).nonzero().squeeze(1)
            items, ranker = self._ranker_of(domain, clicks.values.device)
            excluded = None if exclude is None else _places_among(items, exclude.select(rows))
            places, scores = ranker.rank(queries_BQ[rows], k, excluded, clicks.select(rows))
            ids_BK[rows] = torch.where(places >= 0, items[places.clamp(min=0)], places) if len(items) else places
            scores_BK[rows] = scores
        return ids_BK, scores_BK

    def _ranker_of(self, domain: int, device: torch.device) -> tuple[Tensor, "CatalogRanker"]:
        """The indices of the items of a domain that may be ranked, and a ranker of them; kept for the next batch."""
        assert self._domains is not None
        if domain not in self._of_domain:
            items = self._domains.items(domain)
            if self._chosen_R is not None:
                items = items[torch.isin(items, self._chosen_R)]
            self._of_domain[domain] = items.to(device), self._only(items)
        return self._of_domain[domain]

    def _only(self, items_R: Tensor) -> "CatalogRanker":
        """A ranker of some items, ascending. Its item indices are places among them."""
        first, last = (int(torch.searchsorted(items_R, end)) for end in (self.items.start, self.items.stop))
        rows = items_R[first:last] - self.items.start
        is_range = len(rows) > 0 and len(rows) == int(rows[-1] - rows[0]) + 1
        other = copy.copy(self)
        other.__dict__.pop("_batch_scan", None)
        other._num_items, other.items = len(items_R), range(first, last)
        chosen = range(int(rows[0]), int(rows[-1]) + 1) if is_range else rows
        firsts = [self._num_items * rank // self._world.size for rank in range(self._world.size + 1)]
        most_items = int(torch.searchsorted(items_R, torch.tensor(firsts)).diff().max())
        other._vectors = self._vectors.of_places(chosen, most_items)
        if self._blend is not None:
            other._blend = self._blend.of_items(chosen.numpy() if isinstance(chosen, Tensor) else chosen)
        other._domains = other._chosen_R = other._is_allowed_R = other._reranker = None
        other._scan = None if self._scan is None or not len(rows) else ItemScan.fastest(other.item_vectors)
        return other

    def _scans(self, queries_BQ: Tensor) -> bool:
        most = min(max(self._num_items // _ITEMS_PER_SCANNED_SESSION, 1), _MAX_SCANNED_SESSIONS)
        return self._scan is not None and 0 < len(queries_BQ) <= most and all(map(can_search, queries_BQ))

    def _scanned(
        self, queries_BQ: Tensor, k: int, exclude: Jagged | None, clicks: Jagged | None
    ) -> tuple[Tensor, Tensor]:
        """Ranks one session after the other."""
        assert self._scan is not None
        ranked = []
        for row, query_Q in enumerate(queries_BQ):
            added = None
            if self._blend is not None and clicks is not None:
                added = self._blend.scores_of_session(clicks.row(row).numpy())
            excluded = None if exclude is None else exclude.row(row).numpy()
            ranked.append(self._scan.top_k(query_Q, k, excluded, added, self._is_allowed_R))
        ids, scores = zip(*ranked, strict=True)
        return torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(scores))

    def added_by(self, blend: Blend, clicks: Jagged) -> sparse.csr_array:
        """Scores that a blend adds to this rank's items for the sessions of all ranks, float32 [Y, R].

        Args:
            blend: Blend of this rank's items; see `Blend.of_items`.
            clicks: Clicked item indices of this rank's sessions, oldest first.
        """
        if self._world.size == 1:
            return blend.scores(clicks)
        max_sessions = max(_gather_sizes(clicks.num_rows, clicks.offsets.device, self._world))
        return blend.scores(self._gather_lists(clicks, max_sessions))

    @torch.no_grad()
    def target_ranks(
        self,
        queries_BQ: Tensor,
        targets_B: Tensor,
        added_NYR: Sequence[sparse.csr_array] = (),
        weights_PN: Sequence[Sequence[float]] = ((),),
        exclude: Jagged | None = None,
        depth: int | None = None,
    ) -> Tensor:
        """Number of items ahead of each target under several blends, int64 [P, B] on the CPU.

        With domains, of items of the domain of the target, which is that of the session. The rank of an excluded
        target is `EXCLUDED_RANK`, that of a row without a target (-1) arbitrary.

        Args:
            queries_BQ: Queries.
            targets_B: Item index of each target, int64.
            added_NYR: Scores that are added to those of this rank's items, from `added_by`.
            weights_PN: Sets of weights for the added scores.
            exclude: Item indices that must not be in a session's list, one row per session; on all ranks or on none.
            depth: Number of ranks that are wanted; a target behind them gets any rank behind them, in less time. None
                wants all.

        Raises:
            UserError: A score is NaN; raised on every rank.
        """
        queries, targets, local = queries_BQ.detach().float(), targets_B, slice(None)
        if self._world.size > 1:
            max_sessions = max(_gather_sizes(queries.shape[0], queries.device, self._world))
            local = slice(self._world.rank * max_sessions, self._world.rank * max_sessions + queries.shape[0])
            queries = _gather(_pad_rows(queries, max_sessions), self._world).flatten(0, 1)
            targets = _gather(_pad_rows(targets, max_sessions), self._world).flatten()
            exclude = None if exclude is None else self._gather_lists(exclude, max_sessions)
        num_queries, width = queries.shape[0], -(-self._num_items // self._world.size)
        # Blocks of about the same size.
        rows = max(-(-num_queries // max(-(-num_queries * width // _MAX_SCORES), 1)), 1)
        if self._vectors.kept is None:
            # Parts of them are scored by `_blended_scores`, for one block of items after the other.
            rows = max(num_queries, 1)
        ranks = []
        for start in range(0, num_queries, rows):
            block = slice(start, start + rows)
            excluded = None if exclude is None else exclude.narrow(start, min(start + rows, num_queries))
            added = [added_YR[block] for added_YR in added_NYR]
            ranks.append(self._target_ranks_of_rows(queries[block], targets[block], added, weights_PN, excluded, depth))
        return torch.cat(ranks, dim=1)[:, local] if ranks else torch.empty(len(weights_PN), 0, dtype=torch.int64)

    def _target_ranks_of_rows(
        self,
        queries: Tensor,
        targets: Tensor,
        added: Sequence[sparse.csr_array],
        weights_PN: Sequence[Sequence[float]],
        exclude: Jagged | None,
        depth: int | None,
    ) -> Tensor:
        arguments = queries, targets, _BlockTerms(added), weights_PN, exclude, depth
        kept = list(self._blended_scores(*arguments)) if self._vectors.kept is not None else None
        target_scores = torch.zeros(len(weights_PN), len(queries))
        for rows, blended in kept or self._blended_scores(*arguments):
            target_scores[:, rows] += torch.from_numpy(blended.target_scores())
        # Ranks without the target's item add 0. A NaN on any rank makes the sum NaN, so that all ranks fail together.
        target_scores = sum_over_ranks(target_scores, self._world)
        if target_scores.isnan().any():
            raise UserError(NOT_NUMBERS)
        num_ahead = torch.zeros(len(weights_PN), len(queries), dtype=torch.int64)
        for rows, blended in kept or self._blended_scores(*arguments):
            num_ahead[:, rows] += torch.from_numpy(blended.count_ahead(target_scores[:, rows].numpy()))
        num_ahead = sum_over_ranks(num_ahead, self._world)
        return torch.where(target_scores.isneginf(), EXCLUDED_RANK, num_ahead)

    def _blended_scores(
        self,
        queries: Tensor,
        targets: Tensor,
        terms: "_BlockTerms",
        weights_PN: Sequence[Sequence[float]],
        exclude: Jagged | None,
        depth: int | None,
    ) -> Iterator[tuple[slice, BlendedScores]]:
        """Scores of a block of this rank's items for some sessions at a time, and which sessions these are."""
        domain_V = None if self._domains is None else self._domains.of_item_V.to(queries.device)
        for places, vectors_NQ in self._vectors.blocks():
            if not len(places):
                continue
            added = terms.of_block(places)
            first, num_rows = self.items.start + places.start, max(len(queries), 1)
            if self._vectors.kept is None:
                num_rows = max(_MAX_SCORES // len(places), 1)
            for start in range(0, len(queries), num_rows):
                rows = slice(start, min(start + num_rows, len(queries)))
                scores = queries[rows] @ vectors_NQ.T
                if domain_V is not None:
                    of_items_N = domain_V[first : first + len(places)]
                    of_targets = domain_V[targets[rows].clamp(min=0)]
                    scores.masked_fill_(of_items_N != of_targets.unsqueeze(1), float("-inf"))
                if exclude is not None:
                    excluded = exclude.narrow(rows.start, rows.stop)
                    columns = excluded.values - first
                    is_local = (columns >= 0) & (columns < len(places))
                    scores[excluded.row_of_value[is_local], columns[is_local]] = float("-inf")
                blended = [added_YN[rows] for added_YN in added]
                wanted = targets[rows].cpu().numpy()
                yield rows, BlendedScores(scores.cpu().numpy(), blended, wanted, weights_PN, first, depth)

    def _rank_by_all_ranks(
        self, queries: Tensor, k: int, exclude: Jagged | None, clicks: Jagged | None
    ) -> tuple[Tensor, Tensor]:
        max_sessions = max(_gather_sizes(queries.shape[0], queries.device, self._world))
        queries_WXQ = _gather(_pad_rows(queries, max_sessions), self._world)
        excluded, clicked = (
            None if lists is None else self._gather_lists(lists, max_sessions) for lists in (exclude, clicks)
        )
        ids, scores = self._local_top_k(queries_WXQ.flatten(0, 1), k, excluded, clicked)
        # Each rank gets the lists that all ranks computed for its sessions.
        ids_WXK = _exchange(ids.view(self._world.size, max_sessions, k))
        scores_WXK = _exchange(scores.view(self._world.size, max_sessions, k))
        if (ids_WXK == _FAILED).any():
            raise UserError(NOT_NUMBERS)
        ids_BK, scores_BK = merge_top_k(ids_WXK, scores_WXK, k)
        return ids_BK[: queries.shape[0]], scores_BK[: queries.shape[0]]

    def _top_k(self, queries: Tensor, k: int, exclude: Jagged | None, clicks: Jagged | None) -> tuple[Tensor, Tensor]:
        """Top-K among this rank's items, counted from its first one."""
        blend = self._blend if clicks is not None else None
        if self._vectors.kept is None:
            added_BR = None if blend is None or clicks is None else blend.scores(clicks)
            return self._top_k_in_blocks(queries, k, exclude, added_BR)
        if self._batch_scan is not None and self._batch_scan.can_rank(k):
            rows = None if blend is None or clicks is None else blend.term_rows(clicks)
            if blend is None or rows is not None:
                ranked = self._batch_scan.top_k(queries, k, exclude, rows)
                if ranked is not None:
                    return ranked
        added = None if blend is None or clicks is None else blend.terms_of_scores(clicks)
        return top_k(queries, self.item_vectors, k, exclude, added)

    def _top_k_in_blocks(
        self, queries: Tensor, k: int, exclude: Jagged | None, added_BR: sparse.csr_array | None
    ) -> tuple[Tensor, Tensor]:
        """`_top_k` by blocks of items whose vectors are computed."""
        search, failure = TopKSearch(queries, k), None
        terms = _BlockTerms(() if added_BR is None else (added_BR,))
        for places, vectors_NQ in self._vectors.blocks():
            # All ranks compute all blocks together.
            if failure is not None or not len(places):
                continue
            excluded = None if exclude is None else Jagged(exclude.values - places.start, exclude.offsets)
            try:
                search.add(vectors_NQ, excluded, *terms.of_block(places))
            except UserError as error:
                failure = error
        if failure is not None:
            raise failure
        return search.result()

    @cached_property
    def _batch_scan(self) -> BatchScan | None:
        return BatchScan.where_faster(self.item_vectors)

    def _top_k_of_chosen(
        self, chosen_R: Tensor, queries: Tensor, k: int, exclude: Jagged | None, clicks: Jagged | None
    ) -> tuple[Tensor, Tensor]:
        if self._chosen_RQ is None:
            self._chosen_RQ = self.item_vectors[chosen_R]
        items_RQ, added_BR = self._chosen_RQ, None
        if self._blend is not None and clicks is not None:
            added_BR = sparse.csr_array(self._blend.scores(clicks)[:, chosen_R.numpy()])
        if not len(chosen_R):
            return top_k(queries, items_RQ, k, exclude, added_BR)
        if exclude is not None:
            rows = torch.searchsorted(chosen_R, exclude.values).clamp(max=len(chosen_R) - 1)
            exclude = Jagged(torch.where(chosen_R[rows] == exclude.values, rows, -1), exclude.offsets)
        ids, scores = top_k(queries, items_RQ, k, exclude, added_BR)
        return torch.where(ids >= 0, chosen_R[ids.clamp(min=0)], ids), scores

    def _local_top_k(
        self, queries: Tensor, k: int, exclude: Jagged | None, clicks: Jagged | None
    ) -> tuple[Tensor, Tensor]:
        """Top-K among this rank's items for the sessions of all ranks; lists of `_FAILED` if a score is NaN."""
        if exclude is not None:
            exclude = Jagged(exclude.values - self.items.start, exclude.offsets)
        try:
            ids, scores = self._top_k(queries, k, exclude, clicks)
        except UserError:
            # The other ranks wait for these lists, so the failure is sent to them instead of being raised here.
            return (
                queries.new_full((queries.shape[0], k), _FAILED, dtype=torch.int64),
                queries.new_zeros(queries.shape[0], k),
            )
        return torch.where(ids >= 0, ids + self.items.start, ids), scores

    def _gather_lists(self, lists: Jagged, num_rows: int) -> Jagged:
        """Gathers the rows of all ranks, after padding those of each rank with empty rows to `num_rows`."""
        lengths_WX = _gather(_pad_rows(lists.lengths, num_rows), self._world)
        sizes = lengths_WX.sum(dim=1).tolist()
        values_WY = _gather(_pad_rows(lists.values, max(sizes)), self._world)
        values = torch.cat([row[:size] for row, size in zip(values_WY, sizes, strict=True)])
        return Jagged.from_lengths(values, lengths_WX.flatten())


class _BlockTerms:
    """Sparse terms of the scores of sessions, of one block of items after the other.

    Args:
        terms_YR: The terms, [Y, R] each.
    """

    def __init__(self, terms_YR: Sequence[sparse.csr_array]) -> None:
        self._by_session = terms_YR
        self._by_item: list[sparse.csc_array] | None = None

    def of_block(self, places: range) -> list[sparse.csr_array]:
        """The columns of a block of items, float32 [Y, N] each."""
        if all(len(places) == term_YR.shape[1] for term_YR in self._by_session):
            return list(self._by_session)
        if self._by_item is None:
            # In order of items, so that the terms of a block are a slice.
            self._by_item = [sparse.csc_array(term_YR) for term_YR in self._by_session]
        return [sparse.csr_array(term_YR[:, places.start : places.stop]) for term_YR in self._by_item]


def _places_among(items_R: Tensor, lists: Jagged) -> Jagged:
    """Places among some items, ascending, of the values of each row that are among them."""
    if not len(items_R):
        return lists.where(torch.zeros_like(lists.values, dtype=torch.bool))
    places = torch.searchsorted(items_R, lists.values).clamp(max=len(items_R) - 1)
    is_among = items_R[places] == lists.values
    found = Jagged(places, lists.offsets)
    return found if is_among.all() else found.where(is_among)


def _gather_sizes(size: int, device: torch.device, world: World) -> list[int]:
    return _gather(torch.tensor([size], device=device), world).flatten().tolist()


def _gather(values: Tensor, world: World) -> Tensor:
    """Stacks tensors of equal shape from all ranks, in rank order."""
    gathered = values.new_empty(world.size, *values.shape)
    dist.all_gather(list(gathered.unbind()), values.contiguous())
    return gathered


def _exchange(parts_WXK: Tensor) -> Tensor:
    """Sends part w to rank w and returns the received parts in rank order (all-to-all)."""
    received = torch.empty_like(parts_WXK)
    dist.all_to_all_single(received, parts_WXK.contiguous())
    return received


def _pad_rows(values: Tensor, rows: int) -> Tensor:
    padded = values.new_zeros(rows, *values.shape[1:])
    padded[: values.shape[0]] = values
    return padded
