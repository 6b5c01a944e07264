"""Sessions in, ranked items out: reading, ranking and writing overlap, and every input row gets its output row.

Shapes: R rows of a part, B sessions of this rank's slice of a batch, L clicks, K places of a ranked list.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmgr_rec.baselines.blend import clicks_of
from llmgr_rec.baselines.knn import Popularity
from llmgr_rec.data.batch import RawSessions, SessionBatch
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed.collectives import sum_over_ranks
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.ranking import CatalogRanker
from llmgr_rec.evaluation.protocol import evaluation_mode
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.scoring.background import WriteBehind, read_ahead
from llmgr_rec.scoring.input import Part, PartSessions, SessionFiles
from llmgr_rec.scoring.output import ScoreFolder
from llmgr_rec.scoring.routing import ROUTE_ALL, Routing, uncertainty
from llmgr_rec.storage.bundle import Bundle

# Batches made ready while the model works, and parts that wait for the disk.
_READ_AHEAD = 4
_WRITE_BEHIND = 2


@dataclass(frozen=True)
class ScoreSettings:
    """What decides the output beside input and model.

    Args:
        k: Items a session.
        exclude_seen: Whether items of a session are left out of its own list.
        max_length: Newest clicks that the model sees.
        batch_size: Sessions of a batch of one rank.
        routing: Which sessions are routed to the language model; the session recommender answers the others.
    """

    k: int
    exclude_seen: bool
    max_length: int
    batch_size: int
    routing: Routing = ROUTE_ALL


@dataclass(frozen=True)
class _RankBatch:
    """This rank's sessions of one step; all ranks go through as many steps.

    Args:
        rows: Rows of the part that the batch answers, [B]; empty where it only keeps the ranks in step.
        batch: The sessions.
        exclude: Items that the sessions must not get.
        sessions: Sessions that all ranks answer in this step.
        routed: Whether the language model encodes them, where the model has one.
    """

    rows: Tensor
    batch: SessionBatch
    exclude: Jagged | None
    sessions: int
    routed: bool


@dataclass
class _RankedPart:
    """A part with its lists; rows that another rank answers, or without a known click, are zero.

    Args:
        part: The part.
        sessions: Its sessions.
        k: Places of a list.
        routed: Sessions that were routed to the language model, over all ranks.
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
        """Which sessions have no known click."""
        return np.diff(self.sessions.offsets) == 0


class Scorer:
    """Ranks the catalog for the sessions of many parts.

    Args:
        bundle: The trained model; its blend is added whether the language model or the session recommender scores.
        settings: Settings that decide the output.
        world: Ranks; all go through the same parts, each with its share of the batches, and rank 0 writes.
    """

    def __init__(
        self,
        bundle: Bundle,
        settings: ScoreSettings,
        world: World,
    ) -> None:
        self._ranking = bundle.ranking(settings.batch_size)
        self._catalog = bundle.catalog
        self._settings = settings
        # A list cannot hold more items than the catalog.
        self._k = min(settings.k, bundle.catalog.num_items)
        self._world = world
        self._fallback = Popularity(bundle.catalog.train_count_V.numpy())
        self._routes = bundle.spec.encodes_prompts and not settings.routing.routes_all
        self._has_language_model = bundle.spec.has_language_model

    @torch.no_grad()  # not inference_mode, which breaks fbgemm's CPU lookup and gloo's collectives
    def run(
        self, files: SessionFiles, parts: list[Part], folder: ScoreFolder, on_rows: Callable[[int], object]
    ) -> None:
        """Scores parts and writes them.

        Args:
            files: The input.
            parts: Parts to do; the same on all ranks.
            folder: Where they go.
            on_rows: Told of sessions as they are ranked.
        """
        with (
            evaluation_mode(self._ranking.model),
            WriteBehind[_RankedPart](lambda ranked: self._write(ranked, folder), _WRITE_BEHIND) as out,
        ):
            ranker = self._ranking.ranker(self._world)
            current: _RankedPart | None = None
            for element in read_ahead(self._parts_and_batches(files, parts), _READ_AHEAD):
                if isinstance(element, _RankBatch):
                    assert current is not None
                    self._rank(ranker, element, current)
                    on_rows(element.sessions)
                    continue
                if current is not None:
                    self._complete(ranker, current)
                    if self._world.rank == 0:
                        out.put(current)
                current = element
                on_rows(0 if current is None else int(current.is_empty_R.sum()))

    def _parts_and_batches(self, files: SessionFiles, parts: list[Part]) -> Iterator[_RankedPart | _RankBatch | None]:
        """Each part, followed by its batches; a last None ends the last part."""
        for part in parts:
            ranked = _RankedPart(part, files.read(part), k=self._k)
            yield ranked
            known_S = np.flatnonzero(np.diff(ranked.sessions.offsets))
            yield from self._batches(ranked.sessions, known_S, routed=not self._routes)
        yield None

    def _batches(self, sessions: PartSessions, rows_S: NDArray[np.int64], routed: bool) -> Iterator[_RankBatch]:
        """This rank's batches of some rows of a part: whole batches in turn, as many for each rank.

        No batch holds rows of two parts, so a restart changes nothing. Nor does the number of ranks change what a
        session shares its batch with, which keeps rounding the same in all but the last product with the items.
        """
        size, world = self._settings.batch_size, self._world
        # Sessions of like length share a batch, which saves padding. The sort is stable, so it is the same every time.
        order_S = rows_S[np.argsort(np.diff(sessions.offsets)[rows_S], kind="stable")]
        all_clicks = Jagged(torch.from_numpy(sessions.items_L), torch.from_numpy(sessions.offsets))
        for first in range(0, len(order_S), size * world.size):
            start = first + world.rank * size
            rows = torch.from_numpy(order_S[start : start + size])
            # A rank without a batch goes along with one session whose answer is thrown away.
            clicks = all_clicks.select(rows if rows.numel() else torch.from_numpy(order_S[:1]))
            yield _RankBatch(
                rows=rows,
                batch=self._ranking.collate(self._raw(clicks)),
                exclude=clicks if self._settings.exclude_seen else None,
                sessions=min(size * world.size, len(order_S) - first),
                routed=routed,
            )

    def _raw(self, clicks: Jagged) -> RawSessions:
        lengths = clicks.lengths.clamp(max=self._settings.max_length)
        newest = clicks.gather(clicks.offsets[1:] - lengths, lengths)
        none_B = torch.full_like(lengths, -1)
        return RawSessions(
            items_L=newest.values,
            offsets_B1=newest.offsets,
            targets_B=none_B,
            weights_B=torch.ones(len(lengths)),
            rows_B=none_B,
            global_size=len(lengths),
        )

    def _rank(self, ranker: CatalogRanker, step: _RankBatch, ranked: _RankedPart) -> None:
        """Ranks the catalog for a batch and keeps the lists in its part."""
        device = self._world.device
        batch = step.batch.to(device)
        exclude = None if step.exclude is None else step.exclude.to(device)
        clicks = None if self._ranking.blend is None else clicks_of(batch)
        ids_BK, scores_BK = ranker.rank(self._queries(batch, step.routed), self._k, exclude, clicks)
        ranked.ids_RK[step.rows] = ids_BK[: step.rows.numel()].cpu()
        ranked.scores_RK[step.rows] = scores_BK[: step.rows.numel()].float().cpu()

    def _queries(self, batch: SessionBatch, routed: bool) -> Tensor:
        """Queries of a batch, [B, Q]."""
        model = self._ranking.model
        if isinstance(model, LLMGR) and not routed:
            return model.recommender_queries(batch)
        return self._ranking.queries(batch)

    def _complete(self, ranker: CatalogRanker, ranked: _RankedPart) -> None:
        """Gives every rank all lists of a part, and reranks the sessions that are routed to the language model."""
        self._sum_over_ranks(ranked)
        if not self._routes:
            if self._has_language_model:
                ranked.routed = ranked.part.rows - int(ranked.is_empty_R.sum())
            return
        uncertainty_R = uncertainty(ranked.scores_RK).masked_fill(torch.from_numpy(ranked.is_empty_R), -math.inf)
        rows_S = self._settings.routing.choose(uncertainty_R)
        ranked.routed = rows_S.numel()
        reranked = _RankedPart(ranked.part, ranked.sessions, k=self._k)
        for step in read_ahead(self._batches(ranked.sessions, rows_S.numpy(), routed=True), _READ_AHEAD):
            self._rank(ranker, step, reranked)
        self._sum_over_ranks(reranked)
        ranked.ids_RK[rows_S], ranked.scores_RK[rows_S] = reranked.ids_RK[rows_S], reranked.scores_RK[rows_S]

    def _sum_over_ranks(self, ranked: _RankedPart) -> None:
        # Each row is zero on all ranks but one, so the sum is that rank's answer to the bit.
        sum_over_ranks(ranked.ids_RK, self._world)
        sum_over_ranks(ranked.scores_RK, self._world)

    def _write(self, ranked: _RankedPart, folder: ScoreFolder) -> None:
        empty = int(ranked.is_empty_R.sum())
        folder.write(ranked.part, self._table(ranked), ranked.sessions.unknown_items, empty, ranked.routed)

    def _table(self, ranked: _RankedPart) -> pa.Table:
        ids_RK, scores_RK = ranked.ids_RK.numpy(), ranked.scores_RK.numpy()
        empty_R = ranked.is_empty_R
        nothing = np.zeros(0, np.int64)
        ids_RK[empty_R], scores_RK[empty_R] = self._fallback.rank(nothing, np.zeros(2, np.int64), self._k)
        # A catalog may have fewer than K items to offer.
        offered_RK = ids_RK >= 0
        offsets = pa.array(np.concatenate([[0], np.cumsum(offered_RK.sum(1))]), type=pa.int32())
        item_ids = self._catalog.item_ids.take(pa.array(ids_RK[offered_RK]))
        lists = {
            "item_ids": pa.ListArray.from_arrays(offsets, item_ids),
            "scores": pa.ListArray.from_arrays(offsets, pa.array(scores_RK[offered_RK], type=pa.float32())),
            "fallback": pa.array(empty_R),
        }
        first, *others = ranked.sessions.table.column_names
        columns = {first: ranked.sessions.table[first], **lists}
        columns.update({name: ranked.sessions.table[name] for name in others})
        return pa.table(columns)
