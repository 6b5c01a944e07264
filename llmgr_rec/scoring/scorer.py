"""Scorer: ranks items for the sessions of a job. Reading, ranking and writing overlap.

Shapes: R rows of a part, B sessions of this rank's batch, S selected rows of a part, L clicks, K length of a ranked
list, Q width of queries.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmgr_rec.baselines.in_domains import popular_items
from llmgr_rec.baselines.knn import Popularity
from llmgr_rec.data.batch import RawSessions, SessionBatch
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.repeats import ConsecutiveRepeats
from llmgr_rec.distributed.collectives import sum_over_ranks
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.ranking import CatalogRanker
from llmgr_rec.evaluation.exclusion import RankingRule
from llmgr_rec.evaluation.protocol import GroupOfBatches, QueryBatch, evaluation_mode
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.scoring.background import WriteBehind, read_ahead
from llmgr_rec.scoring.input import Part, PartSessions, SessionFiles
from llmgr_rec.scoring.output import ScoreFolder
from llmgr_rec.scoring.ranked_lists import RankedLists
from llmgr_rec.scoring.routing import ROUTE_ALL, Routing, uncertainty
from llmgr_rec.storage.bundle import Bundle

# Batches that are prepared in advance, and ranked parts that may wait to be written.
_READ_AHEAD = 4
_WRITE_BEHIND = 2
# Clicks of a batch for each session that it may have.
_CLICKS_PER_SESSION = 8
# Memory of an item of a list: index and score.
LIST_ITEM_BYTES = 12


@dataclass(frozen=True)
class ScoreSettings:
    """Settings that determine the output, in addition to input and model.

    Args:
        k: Items per session.
        rule: What a ranking shows and excludes of a session.
        consecutive_repeats: Whether clicks in a row on the same item are merged, as in the training data.
        batch_size: Sessions per batch of one rank.
        routing: Rule that routes sessions to the language model; the session recommender scores the others.
        titles: Whether the output has the titles of the items.
    """

    k: int
    rule: RankingRule
    consecutive_repeats: ConsecutiveRepeats
    batch_size: int
    routing: Routing = ROUTE_ALL
    titles: bool = False


@dataclass(frozen=True)
class _RankBatch:
    """This rank's batch of one step. All ranks take the same number of steps.

    Args:
        rows: Rows of the part that the batch ranks, int64 [B]; empty for a rank that only takes part in the
            collectives of the step.
        batch: The sessions.
        exclude: Item indices that must not be in a session's list.
        sessions: Number of sessions of all ranks in this step.
        routed: Whether the language model, if there is one, encodes the sessions.
    """

    rows: Tensor
    batch: SessionBatch
    exclude: Jagged | None
    sessions: int
    routed: bool


@dataclass
class _RankedPart:
    """A part with its ranked lists. Until the ranks are summed, rows of other ranks are zero.

    Args:
        part: The part.
        sessions: Sessions of the part.
        k: Length of a list.
        routed: Number of sessions that a language model encoded, over all ranks.
    """

    part: Part
    sessions: PartSessions
    k: int
    routed: int = 0
    ids_RK: Tensor = field(init=False)
    scores_RK: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.ids_RK = torch.zeros(self.part.rows, self.k, dtype=torch.int64)
        self.scores_RK = torch.zeros(self.part.rows, self.k)

    @property
    def is_empty_R(self) -> np.ndarray:
        """Mask of the sessions without a known item."""
        return np.diff(self.sessions.offsets) == 0


def share_of_rank(parts: list[Part], world: World) -> list[Part]:
    """Consecutive parts, with about as many rows as those of each other rank. Their files are read in one go.

    Args:
        parts: The parts of all ranks.
        world: This process and the world size.
    """
    rows = np.array([part.rows for part in parts], np.int64)
    # A part belongs to the rank in whose share its middle row lies.
    middle = np.cumsum(rows) - rows / 2
    rank = np.minimum(middle * world.size // max(int(rows.sum()), 1), world.size - 1)
    return [part for part, owner in zip(parts, rank.tolist(), strict=True) if owner == world.rank]


def batch_bounds(lengths_S: NDArray[np.int64], batch_size: int) -> list[int]:
    """First session of each batch, and the number of sessions.

    The memory of a batch grows with its clicks, so batches of long sessions have fewer of them.

    Args:
        lengths_S: Clicks of each session.
        batch_size: Maximum number of sessions of a batch.
    """
    clicks_S = np.cumsum(lengths_S)
    bounds, most, num_sessions = [0], batch_size * _CLICKS_PER_SESSION, len(lengths_S)
    while (start := bounds[-1]) < num_sessions:
        before = int(clicks_S[start - 1]) if start else 0
        affordable = max(int(np.searchsorted(clicks_S, before + most, side="right")), start + 1)
        bounds.append(min(start + batch_size, affordable, num_sessions))
    return bounds


def _in_groups(
    elements: Iterable[_RankedPart | _RankBatch | None], most: int
) -> Iterator[_RankedPart | list[_RankBatch] | None]:
    """Puts consecutive batches together, up to a number; other elements pass as they are."""
    group: list[_RankBatch] = []
    for element in elements:
        if isinstance(element, _RankBatch):
            group.append(element)
            if len(group) < most:
                continue
        if group:
            yield group
            group = []
        if not isinstance(element, _RankBatch):
            yield element


class Scorer:
    """Ranks the catalog for the sessions of parts.

    Ranks that have the whole model take parts of their own and write them, without any exchange. Ranks that share the
    tables of the model share every part: they take its batches in turn, and rank 0 writes it.

    Args:
        bundle: The trained model. Its blend is added to the scores of routed and of other sessions.
        settings: Settings that determine the output.
        world: This process and the world size.
    """

    def __init__(
        self,
        bundle: Bundle,
        settings: ScoreSettings,
        world: World,
    ) -> None:
        self._ranking = bundle.ranking(settings.batch_size, keeps_tables=False)
        if settings.rule.domains == "all":
            self._ranking = replace(self._ranking, domains=None)
        self._catalog = bundle.catalog
        self._settings = settings
        # A list cannot be longer than the catalog.
        self._k = min(settings.k, bundle.catalog.num_items)
        self._all_ranks = world
        # The ranks that share a part.
        self._world = World.alone(world.device) if bundle.is_replicated else world
        self._fallback = Popularity(bundle.catalog.train_count_V.numpy())
        self._routes = bundle.spec.encodes_prompts and not settings.routing.routes_all
        self._has_language_model = bundle.spec.has_language_model

    def share(self, parts: list[Part]) -> list[Part]:
        """The parts that this rank ranks: all, where the ranks share every part.

        Args:
            parts: The parts to score, the same on all ranks.
        """
        return share_of_rank(parts, self._all_ranks) if self._world.size < self._all_ranks.size else parts

    @torch.no_grad()  # not inference_mode, which breaks fbgemm's CPU lookup and gloo's collectives
    def run(
        self, files: SessionFiles, parts: list[Part], folder: ScoreFolder, on_rows: Callable[[int], object]
    ) -> None:
        """Scores parts and writes them. A collective of ranks that share the tables: all must call it.

        Args:
            files: The input.
            parts: The parts of this rank, see `share`.
            folder: The output.
            on_rows: Called with the number of sessions that were ranked since the last call.
        """
        values = {"item_ids": self._catalog.item_ids}
        if self._settings.titles:
            values["titles"] = pa.array(self._catalog.titles(), pa.string())
        lists = RankedLists(values, max(part.rows for part in folder.parts), self._k)
        with (
            evaluation_mode(self._ranking.model),
            WriteBehind[_RankedPart](lambda ranked: self._write(ranked, folder, lists), _WRITE_BEHIND) as out,
        ):
            ranker = self._ranking.ranker(self._world)
            ranking = self._ranking
            if ranking.is_replicated:
                self._ranking = ranking.with_query_encoder(ranker)
            current: _RankedPart | None = None
            elements = read_ahead(self._parts_and_batches(files, parts), _READ_AHEAD)
            for element in _in_groups(elements, self._batches_at_once(ranker)):
                if isinstance(element, list):
                    assert current is not None
                    self._rank(ranker, element, current)
                    on_rows(sum(step.sessions for step in element))
                    continue
                if current is not None:
                    self._complete(ranker, current)
                    if self._world.rank == 0:
                        out.put(current)
                current = element
                on_rows(0 if current is None else int(current.is_empty_R.sum()))

    def _parts_and_batches(self, files: SessionFiles, parts: list[Part]) -> Iterator[_RankedPart | _RankBatch | None]:
        """Iterates over parts, each followed by its batches, and a final None."""
        for part in parts:
            sessions = files.read(part)
            if self._settings.consecutive_repeats == "merge":
                sessions = sessions.without_consecutive_repeats()
            ranked = _RankedPart(part, sessions, k=self._k)
            yield ranked
            known_S = np.flatnonzero(np.diff(ranked.sessions.offsets))
            yield from self._batches(ranked.sessions, known_S, routed=not self._routes)
        yield None

    def _batches(self, sessions: PartSessions, rows_S: NDArray[np.int64], routed: bool) -> Iterator[_RankBatch]:
        """Splits rows of a part into batches and iterates over this rank's; the number is equal on all ranks.

        The composition of a batch, on which rounding depends, is independent of restarts and of the number of ranks: a
        batch contains rows of one part only, and ranks take whole batches in turn. Only the product with item vectors
        is computed for other numbers of sessions and items.
        """
        world = self._world
        # Batches of sessions with similar lengths need less padding. The sort is stable and therefore reproducible.
        order_S = rows_S[np.argsort(np.diff(sessions.offsets)[rows_S], kind="stable")]
        lengths_S = np.minimum(np.diff(sessions.offsets)[order_S], self._settings.rule.max_length)
        all_clicks = Jagged(torch.from_numpy(sessions.items_L), torch.from_numpy(sessions.offsets))
        bounds = batch_bounds(lengths_S, self._settings.batch_size)
        for first in range(0, len(bounds) - 1, world.size):
            of_ranks = bounds[first : first + world.size + 1]
            start, stop = [*of_ranks, *[of_ranks[-1]] * world.size][world.rank : world.rank + 2]
            rows = torch.from_numpy(order_S[start:stop])
            # A rank without a batch takes part in the collectives with one session, whose result is discarded.
            rows_or_filler = rows if rows.numel() else torch.from_numpy(order_S[:1])
            clicks = all_clicks.select(rows_or_filler).last(self._settings.rule.max_length)
            yield _RankBatch(
                rows=rows,
                batch=self._ranking.collate(RawSessions.to_rank(clicks)),
                exclude=clicks if self._settings.rule.excludes_seen else None,
                sessions=of_ranks[-1] - of_ranks[0],
                routed=routed,
            )

    def _batches_at_once(self, ranker: CatalogRanker) -> int:
        """Batches of a part that are ranked at once, the same number on all ranks."""
        return max(ranker.sessions_at_once // self._settings.batch_size, 1)

    def _rank(self, ranker: CatalogRanker, steps: list[_RankBatch], ranked: _RankedPart) -> None:
        """Ranks the catalog for batches and stores the lists in their part."""
        group = GroupOfBatches([self._with_queries(step) for step in steps])
        clicks = group.clicks if ranker.needs_clicks else None
        found = ranker.rank(group.queries_BQ, self._k, group.exclude, clicks)
        sizes = [len(sessions.queries_BQ) for sessions in group.batches]
        for step, ids_BK, scores_BK in zip(steps, *(lists.split(sizes) for lists in found), strict=True):
            ranked.ids_RK[step.rows] = ids_BK[: step.rows.numel()].cpu()
            ranked.scores_RK[step.rows] = scores_BK[: step.rows.numel()].float().cpu()

    def _with_queries(self, step: _RankBatch) -> QueryBatch:
        batch = step.batch.to(self._world.device)
        exclude = None if step.exclude is None else step.exclude.to(self._world.device)
        return QueryBatch(batch, self._queries(batch, step.routed), exclude)

    def _queries(self, batch: SessionBatch, routed: bool) -> Tensor:
        """Queries of a batch, [B, Q], by the language model if routed."""
        model = self._ranking.model
        if isinstance(model, LLMGR) and not routed:
            return model.recommender_queries(batch)
        return self._ranking.queries(batch)

    def _complete(self, ranker: CatalogRanker, ranked: _RankedPart) -> None:
        """Exchanges the lists of a part between ranks, then ranks the sessions that are routed again by the LLM."""
        self._sum_over_ranks(ranked)
        if not self._routes:
            if self._has_language_model:
                ranked.routed = ranked.part.rows - int(ranked.is_empty_R.sum())
            return
        uncertainty_R = uncertainty(ranked.scores_RK).masked_fill(torch.from_numpy(ranked.is_empty_R), -math.inf)
        rows_S = self._settings.routing.choose(uncertainty_R)
        ranked.routed = rows_S.numel()
        reranked = _RankedPart(ranked.part, ranked.sessions, k=self._k)
        batches = read_ahead(self._batches(ranked.sessions, rows_S.numpy(), routed=True), _READ_AHEAD)
        while steps := list(islice(batches, self._batches_at_once(ranker))):
            self._rank(ranker, steps, reranked)
        self._sum_over_ranks(reranked)
        ranked.ids_RK[rows_S], ranked.scores_RK[rows_S] = reranked.ids_RK[rows_S], reranked.scores_RK[rows_S]

    def _sum_over_ranks(self, ranked: _RankedPart) -> None:
        # Each row is zero on all ranks but one, so the sum is exact.
        sum_over_ranks(ranked.ids_RK, self._world)
        sum_over_ranks(ranked.scores_RK, self._world)

    def _write(self, ranked: _RankedPart, folder: ScoreFolder, lists: RankedLists) -> None:
        empty = int(ranked.is_empty_R.sum())
        sessions = ranked.sessions
        folder.write(
            ranked.part,
            self._table(ranked, lists),
            unknown_items=sessions.unknown_items,
            fallback_rows=empty,
            llm_rows=ranked.routed,
            consecutive_repeats=sessions.consecutive_repeats,
        )

    def _table(self, ranked: _RankedPart, lists: RankedLists) -> pa.Table:
        ids_RK, scores_RK = ranked.ids_RK.numpy(), ranked.scores_RK.numpy()
        empty_R = ranked.is_empty_R
        domain_R = ranked.sessions.domain_R
        if domain_R is None or self._settings.rule.domains == "all":
            domain_R = np.full(len(empty_R), -1)
        ids_RK[empty_R], scores_RK[empty_R] = popular_items(
            self._fallback, self._catalog.domains, domain_R[empty_R], self._k
        )
        session_id, *copied = ranked.sessions.table.column_names
        columns = {
            session_id: ranked.sessions.table[session_id],
            # Lists are shorter than K if fewer items remain after exclusion.
            **lists.columns(ids_RK, scores_RK),
            "fallback": pa.array(empty_R),
        }
        columns.update({name: ranked.sessions.table[name] for name in copied})
        return pa.table(columns)
