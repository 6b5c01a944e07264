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

from llmgr_rec.data.batch import RawSessions, SessionBatch
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.collate import Collator
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed.neighbour_prior import NeighbourPrior, clicks_of
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.ranking import CatalogueRanker
from llmgr_rec.distributed.reduce import sum_over_ranks
from llmgr_rec.evaluation.baselines import Popularity
from llmgr_rec.evaluation.protocol import evaluation_mode
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.scoring.background import WriteBehind, read_ahead
from llmgr_rec.scoring.governor import READ_ALL, Governor, uncertainty
from llmgr_rec.scoring.input import Part, PartSessions, SessionFiles
from llmgr_rec.scoring.output import ScoreFolder

# Batches made ready while the model works, and parts that wait for the disk.
_READ_AHEAD = 4
_WRITE_BEHIND = 2

OUTPUT_COLUMNS = ("item_ids", "scores", "fallback")


@dataclass(frozen=True)
class ScoreSettings:
    """What decides the output beside input and model.

    Args:
        k: Items a session.
        exclude_seen: Whether items of a session are left out of its own list.
        max_length: Newest clicks that the model sees.
        batch_size: Sessions of a batch of one rank.
        governor: Which sessions a language model reads; the session recommender answers the others.
    """

    k: int
    exclude_seen: bool
    max_length: int
    batch_size: int
    governor: Governor = READ_ALL


@dataclass(frozen=True)
class _Round:
    """This rank's batch of a round: the rows that it answers (none for a filler) and what the model takes.

    Args:
        rows: Rows of the part, [B]; empty where the batch is there only to keep the ranks in step.
        batch: What the model takes.
        exclude: Items that the sessions must not get.
        sessions: Sessions that all ranks answer in this round.
        reads: Whether the language model reads, where the model has one.
    """

    rows: Tensor
    batch: SessionBatch
    exclude: Jagged | None
    sessions: int
    reads: bool


@dataclass
class _Ranked:
    """A part with its lists, zero where another rank answers or nothing was clicked.

    Args:
        part: The part.
        sessions: Its sessions.
        k: Places of a list.
        read: Sessions that the language model has read, over all ranks.
    """

    part: Part
    sessions: PartSessions
    ids_RK: Tensor = field(init=False)
    scores_RK: Tensor = field(init=False)
    k: int
    read: int = 0

    def __post_init__(self) -> None:
        self.ids_RK = torch.zeros(self.part.rows, self.k, dtype=torch.int64)
        self.scores_RK = torch.zeros(self.part.rows, self.k)

    @property
    def is_empty_R(self) -> np.ndarray:
        """Which sessions hold no known click."""
        return np.diff(self.sessions.offsets) == 0


class Scorer:
    """Ranks the catalogue for the sessions of many parts.

    Args:
        model: The trained model.
        catalogue: Its items.
        collate: Makes batches for ranking.
        settings: What decides the output.
        world: Ranks; all go through the same parts, each with its share of the batches, and rank 0 writes.
        prior: What neighbours add to the scores, whoever answers: language model or session recommender.
    """

    def __init__(
        self,
        model: SessionRecommender | LLMGR,
        catalogue: Catalogue,
        collate: Collator,
        settings: ScoreSettings,
        world: World,
        prior: NeighbourPrior | None = None,
    ) -> None:
        self._model = model
        self._catalogue = catalogue
        self._collate = collate
        self._settings = settings
        # Lists hold no more, whatever is asked for.
        self._k = min(settings.k, catalogue.num_items)
        self._world = world
        self._prior = prior
        self._fallback = Popularity(catalogue.train_count_V.numpy())
        self._governed = isinstance(model, LLMGR) and not settings.governor.reads_all

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
            evaluation_mode(self._model),
            WriteBehind[_Ranked](lambda done: self._write(done, folder), _WRITE_BEHIND) as out,
        ):
            ranker = CatalogueRanker(self._model, self._collate, self._world, self._prior)
            ranked: _Ranked | None = None
            for element in read_ahead(self._events(files, parts), _READ_AHEAD):
                if isinstance(element, _Round):
                    assert ranked is not None
                    self._rank(ranker, element, ranked)
                    on_rows(element.sessions)
                    continue
                if ranked is not None:
                    self._share(ranked)
                    if self._governed:
                        self._read_uncertain(ranker, ranked)
                    if self._world.rank == 0:
                        out.put(ranked)
                ranked = element
                on_rows(0 if ranked is None else int(ranked.is_empty_R.sum()))

    def _events(self, files: SessionFiles, parts: list[Part]) -> Iterator[_Ranked | _Round | None]:
        """Each part, followed by its batches; a last None closes the last part."""
        for part in parts:
            ranked = _Ranked(part, files.read(part), k=self._k)
            yield ranked
            known = np.flatnonzero(np.diff(ranked.sessions.offsets))
            yield from self._batches(ranked.sessions, known, reads=not self._governed)
        yield None

    def _batches(self, sessions: PartSessions, rows_S: NDArray[np.int64], reads: bool) -> Iterator[_Round]:
        """This rank's batches of some rows of a part: whole ones dealt out in turn, as many to each rank.

        No batch holds rows of two parts, so a restart changes nothing. Nor does the number of ranks change what a
        session shares its batch with, which keeps rounding the same in all but the last product with the items.
        """
        size, world = self._settings.batch_size, self._world
        # Sessions of like length share a batch, which saves padding. The sort is stable, so it is the same every time.
        order = rows_S[np.argsort(np.diff(sessions.offsets)[rows_S], kind="stable")]
        clicks = Jagged(torch.from_numpy(sessions.items_L), torch.from_numpy(sessions.offsets))
        for first in range(0, len(order), size * world.size):
            start = first + world.rank * size
            rows = torch.from_numpy(order[start : start + size])
            # A rank without a batch goes along with one session whose answer is thrown away.
            seen = clicks.select(rows if rows.numel() else torch.from_numpy(order[:1]))
            yield _Round(
                rows=rows,
                batch=self._collate(self._raw(seen)),
                exclude=seen if self._settings.exclude_seen else None,
                sessions=min(size * world.size, len(order) - first),
                reads=reads,
            )

    def _raw(self, seen: Jagged) -> RawSessions:
        lengths = seen.lengths.clamp(max=self._settings.max_length)
        newest = seen.gather(seen.offsets[1:] - lengths, lengths)
        none_B = torch.full_like(lengths, -1)
        return RawSessions(
            items_L=newest.values,
            offsets_B1=newest.offsets,
            targets_B=none_B,
            weights_B=torch.ones(len(lengths)),
            rows_B=none_B,
            global_size=len(lengths),
        )

    def _rank(self, ranker: CatalogueRanker, piece: _Round, ranked: _Ranked) -> None:
        device = self._world.device
        exclude = piece.exclude.to(device) if piece.exclude is not None else None
        batch = piece.batch.to(device)
        if piece.reads:
            queries_BQ = self._model(batch) if isinstance(self._model, LLMGR) else self._model.queries(batch)
        else:
            assert isinstance(self._model, LLMGR)
            queries_BQ = self._model.recommender_queries(batch)
        clicks = None if self._prior is None else clicks_of(batch)
        ids_BK, scores_BK = ranker.rank(queries_BQ, self._k, exclude, clicks)
        ranked.ids_RK[piece.rows] = ids_BK[: piece.rows.numel()].cpu()
        ranked.scores_RK[piece.rows] = scores_BK[: piece.rows.numel()].float().cpu()

    def _share(self, ranked: _Ranked) -> None:
        """Gives every rank the answers of all."""
        # Each row is zero on all ranks but one, so the sum is that rank's answer to the bit.
        sum_over_ranks(ranked.ids_RK, self._world)
        sum_over_ranks(ranked.scores_RK, self._world)

    def _read_uncertain(self, ranker: CatalogueRanker, ranked: _Ranked) -> None:
        """Has the language model answer in place of the session recommender where that was least sure."""
        uncertainty_R = uncertainty(ranked.scores_RK).masked_fill(torch.from_numpy(ranked.is_empty_R), -math.inf)
        rows_S = self._settings.governor.choose(uncertainty_R)
        ranked.read = rows_S.numel()
        answers = _Ranked(ranked.part, ranked.sessions, k=self._k)
        for piece in read_ahead(self._batches(ranked.sessions, rows_S.numpy(), reads=True), _READ_AHEAD):
            self._rank(ranker, piece, answers)
        self._share(answers)
        ranked.ids_RK[rows_S], ranked.scores_RK[rows_S] = answers.ids_RK[rows_S], answers.scores_RK[rows_S]

    def _write(self, ranked: _Ranked, folder: ScoreFolder) -> None:
        table = self._table(ranked)
        empty = int(ranked.is_empty_R.sum())
        read = ranked.read if self._governed else ranked.part.rows - empty if isinstance(self._model, LLMGR) else 0
        folder.write(ranked.part, table, ranked.sessions.unknown_items, empty, read)

    def _table(self, ranked: _Ranked) -> pa.Table:
        ids_RK, scores_RK = ranked.ids_RK.numpy(), ranked.scores_RK.numpy()
        empty_R = ranked.is_empty_R
        nothing = np.zeros(0, np.int64)
        ids_RK[empty_R], scores_RK[empty_R] = self._fallback.rank(nothing, np.zeros(2, np.int64), self._k)
        # A catalogue may have fewer than K items to offer.
        offered_RK = ids_RK >= 0
        offsets = pa.array(np.concatenate([[0], np.cumsum(offered_RK.sum(1))]), type=pa.int32())
        item_ids = self._catalogue.item_ids.take(pa.array(ids_RK[offered_RK]))
        lists = {
            "item_ids": pa.ListArray.from_arrays(offsets, item_ids),
            "scores": pa.ListArray.from_arrays(offsets, pa.array(scores_RK[offered_RK], type=pa.float32())),
            "fallback": pa.array(empty_R),
        }
        first, *others = ranked.sessions.table.column_names
        columns = {first: ranked.sessions.table[first], **lists}
        columns.update({name: ranked.sessions.table[name] for name in others})
        return pa.table(columns)
