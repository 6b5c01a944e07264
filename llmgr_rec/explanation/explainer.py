"""Explains recommendations: the parts of their scores, and what each click of the session means for them.

Shapes: C clicks as given, L clicks that the model is shown, K items, Q columns of item vectors, V items of the catalog.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from llmgr_rec.baselines.blend import Blend, clicks_of
from llmgr_rec.baselines.sparse_scores import Floats, Ints
from llmgr_rec.data.batch import RawSessions, SessionBatch
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed.ranking import EXCLUDED_RANK
from llmgr_rec.errors import UserError
from llmgr_rec.explanation.attribution import gradient_times_input, scores_without
from llmgr_rec.explanation.explanation_text import item_sentence
from llmgr_rec.explanation.records import (
    Click,
    ClickPart,
    ClickShare,
    Edge,
    ExplainedItem,
    Explanation,
    NearItem,
    Node,
    Part,
    Smoothing,
)
from llmgr_rec.explanation.session_clicks import SessionClicks
from llmgr_rec.explanation.shared_words import SharedWords
from llmgr_rec.scoring.session_ranker import SessionRanker
from llmgr_rec.storage.bundle import BundleFiles, load_blend_terms

# Items of an explanation.
MOST_ITEMS = 100
# Clicks that are left out, one at a time, where each time a language model encodes the session again.
LANGUAGE_MODEL_CLICKS = 10
_NEAREST = 5
# Parts that compare texts by their words.
_BY_WORDS = "text_knn"


@dataclass(frozen=True)
class _Scored:
    """Values of K items for a session.

    Args:
        parts: The parts of the scores.
        left_out_LK: What leaving out each click lowers the scores by; NaN if it was not computed.
        gradient_LK: Gradient times input; None if the encoder is no part of the score.
    """

    parts: "list[_PartValues]"
    left_out_LK: Floats
    gradient_LK: Floats | None


@dataclass(frozen=True)
class _PartValues:
    """One part of the scores of K items.

    Args:
        name: See `Part.name`.
        values_K: What it adds to the score of each item.
        weight: Weight of the baseline, where the part is one.
        recency_L: Weight of each click by its recency, where the part is a sum over clicks.
        clicks_LK: What each click adds.
    """

    name: str
    values_K: Floats
    weight: float | None = None
    recency_L: Floats | None = None
    clicks_LK: Floats | None = None


class Explainer:
    """Explains the recommendations of a loaded model.

    Args:
        files: The opened bundle of the model.
        ranker: The loaded model.
    """

    def __init__(self, files: BundleFiles, ranker: SessionRanker) -> None:
        self._files, self._catalog, self._ranker = files, files.catalog, ranker
        self._ranking = ranker.model
        self._merges_repeats = files.index.consecutive_repeats == "merge"
        self._has_language_model = set(self._ranking.model.score_columns) != {"encoder"}

    @cached_property
    def _terms(self) -> tuple[Blend, ...]:
        """The blend of each baseline; all in one if an earlier version wrote the bundle."""
        blend = self._ranking.blend
        return () if blend is None else load_blend_terms(self._files) or (blend,)

    @cached_property
    def _words(self) -> SharedWords:
        return SharedWords(self._catalog)

    @torch.no_grad()
    def explain(
        self,
        ids_C: pa.Array,
        k: int = 5,
        items: pa.Array | None = None,
        exclude_seen: bool | None = None,
    ) -> Explanation:
        """Explains the recommendations for a session.

        Args:
            ids_C: Raw ids of the session's clicks, oldest first.
            k: Number of recommended items to explain, if no items are given.
            items: Raw ids of the items to explain, recommended or not.
            exclude_seen: As in `Recommender.recommend`.

        Raises:
            UserError: `k` or the number of items is out of range, or an item is not in the catalog.
        """
        if nulls := pc.sum(pc.is_null(ids_C, nan_is_null=True)).as_py():
            raise UserError(f"the session holds {nulls:,} null item ids; remove them")
        wanted = self._wanted(k, items)
        indices_C = self._catalog.index_of(ids_C) if len(ids_C) else np.zeros(0, np.int64)
        clicks = SessionClicks(indices_C, self._merges_repeats, self._ranker.rule.max_length)
        excludes = self._ranker.rule.excludes_seen if exclude_seen is None else exclude_seen
        if not len(clicks.places_L):
            return self._explain_popular(ids_C, clicks, k, wanted)
        shown = clicks.shown
        batch = self._ranking.collate(RawSessions.to_rank(shown))
        queries_1Q = self._ranking.queries(batch)
        items_K, ranks_K = self._ranks(batch, queries_1Q, shown, k, wanted, excludes)
        scored = self._scored(queries_1Q, clicks, items_K)
        explained = [
            self._item(place, int(item), int(rank), clicks, excludes, scored)
            for place, (item, rank) in enumerate(zip(items_K, ranks_K, strict=True))
        ]
        nodes, edges = self._graph(batch, clicks)
        return Explanation(
            stage=self._files.index.stage,
            fallback=False,
            clicks=self._clicks(ids_C, clicks),
            nodes=nodes,
            edges=edges,
            items=[replace(item, text=item_sentence(item)) for item in explained],
            note=self._note(clicks),
        )

    def _wanted(self, k: int, items: pa.Array | None) -> Ints | None:
        """Indices of the given items; None if the recommended ones are asked for."""
        count = k if items is None else len(items)
        if not 1 <= count <= MOST_ITEMS:
            what = "k is" if items is None else "number of items is"
            raise UserError(f"{what} {count}; an explanation has 1 to {MOST_ITEMS} items")
        if items is None:
            return None
        indices = self._catalog.index_of(items)
        if (indices < 0).any():
            unknown = items[int(np.flatnonzero(indices < 0)[0])].as_py()
            raise UserError(f"item {unknown!r} is not in the catalog of {self._catalog.num_items:,} items")
        return indices

    def _ranks(
        self, batch: SessionBatch, queries_1Q: Tensor, shown: Jagged, k: int, wanted: Ints | None, excludes: bool
    ) -> tuple[Ints, Ints]:
        """Items to explain and the rank of each, from 1; 0 for an excluded item."""
        exclude = shown if excludes else None
        blended = clicks_of(batch)
        if wanted is None:
            ids_1K, _ = self._ranker.catalog_ranker.rank(queries_1Q, min(k, self._catalog.num_items), exclude, blended)
            items_K = ids_1K[0][ids_1K[0] >= 0].numpy()
            return items_K, np.arange(1, len(items_K) + 1)
        rows = torch.zeros(len(wanted), dtype=torch.int64)
        blend = self._ranking.blend
        added = (
            []
            if blend is None
            else [self._ranker.catalog_ranker.added_by(blend, blended)[np.zeros(len(wanted), np.int64)]]
        )
        ranks_1K = self._ranker.catalog_ranker.target_ranks(
            queries_1Q[rows],
            torch.from_numpy(wanted),
            added,
            [[1.0] * len(added)],
            None if exclude is None else exclude.select(rows),
        )
        ranks_K = ranks_1K[0].numpy()
        return wanted, np.where(ranks_K == EXCLUDED_RANK, 0, ranks_K + 1)

    def _scored(self, queries_1Q: Tensor, clicks: SessionClicks, items_K: Ints) -> _Scored:
        items_KQ, clicks_L = self._ranker.catalog_ranker.item_vectors[torch.from_numpy(items_K)], clicks.shown.values
        parts = self._parts(queries_1Q, clicks_L.numpy(), items_KQ, items_K)
        score_K = np.sum([part.values_K for part in parts], axis=0)
        count = len(clicks_L)
        if self._has_language_model:
            count = min(count, LANGUAGE_MODEL_CLICKS)
        left_out_LK = np.full((len(clicks_L), len(items_K)), np.nan)
        left_out_LK[-count:] = score_K - scores_without(self._ranking, clicks.left_out(count), items_KQ, items_K)
        return _Scored(parts, left_out_LK, gradient_times_input(self._ranking, clicks_L, items_KQ))

    def _parts(self, queries_1Q: Tensor, clicks_L: Ints, items_KQ: Tensor, items_K: Ints) -> list[_PartValues]:
        """The summands of the scores."""
        model_parts = self._ranking.score_parts(queries_1Q, items_KQ)
        parts = [_PartValues(name, values_1K[0].numpy()) for name, values_1K in model_parts.items()]
        for term in self._terms:
            recency_L, clicks_LK = term.click_scores(clicks_L, items_K)
            # Several weights belong to the blend of an earlier version, whose baselines are not known apart.
            weight = next(iter(term.weights.values())) if len(term.weights) == 1 else None
            name = "+".join(term.weights)
            parts.append(_PartValues(name, clicks_LK.sum(axis=0), weight, recency_L, clicks_LK))
        return parts

    def _item(
        self, place: int, item: int, rank: int, clicks: SessionClicks, excludes: bool, scored: _Scored
    ) -> ExplainedItem:
        values = [float(part.values_K[place]) for part in scored.parts]
        total = sum(map(abs, values)) or 1.0
        parts = [
            Part(part.name, value, abs(value) / total, part.weight, self._click_parts(part, place, item, clicks))
            for part, value in zip(scored.parts, values, strict=True)
        ]
        clicked = item in clicks.given_C
        return ExplainedItem(
            item_id=self._id(item),
            title=self._title(item),
            rank=rank or None,
            score=sum(values),
            clicked_before=clicked,
            excluded=rank == 0,
            training_clicks=int(self._catalog.train_count_V[item]),
            smoothing=self._smoothing(item),
            parts=sorted(parts, key=lambda part: -part.share),
            clicks=self._click_shares(clicks, scored, place),
            nearest=self._nearest(item),
        )

    def _click_parts(self, part: _PartValues, place: int, item: int, clicks: SessionClicks) -> list[ClickPart]:
        """Clicks that add something to a part, the largest first."""
        if part.clicks_LK is None or part.recency_L is None:
            return []
        found = []
        for number in np.argsort(-np.abs(part.clicks_LK[:, place]), kind="stable"):
            value, clicked = float(part.clicks_LK[number, place]), int(clicks.given_C[clicks.places_L[number]])
            if value == 0:
                break
            recency = float(part.recency_L[number])
            found.append(
                ClickPart(
                    position=int(clicks.places_L[number]) + 1,
                    item_id=self._id(clicked),
                    title=self._title(clicked),
                    similarity=value / recency / (part.weight or 1.0),
                    recency=recency,
                    value=value,
                    words=self._words.of(clicked, item) if part.name == _BY_WORDS else [],
                )
            )
        return found

    def _click_shares(self, clicks: SessionClicks, scored: _Scored, place: int) -> list[ClickShare]:
        shares = []
        for number, given in enumerate(clicks.places_L):
            item, left_out = int(clicks.given_C[given]), float(scored.left_out_LK[number, place])
            gradient = None if scored.gradient_LK is None else float(scored.gradient_LK[number, place])
            shares.append(
                ClickShare(
                    int(given) + 1,
                    self._id(item),
                    self._title(item),
                    None if np.isnan(left_out) else left_out,
                    gradient,
                )
            )
        return shares

    def _nearest(self, item: int) -> list[NearItem]:
        size = min(_NEAREST, self._catalog.num_items)
        ids_1K, cosines_1K = self._ranker.similar(torch.tensor([item]), size)
        return [
            NearItem(self._id(other), self._title(other), cosine)
            for other, cosine in zip(ids_1K[0].tolist(), cosines_1K[0].tolist(), strict=True)
            if other >= 0
        ]

    def _smoothing(self, item: int) -> Smoothing | None:
        strengths = self._files.config.tables.knn_smoothing
        strength = strengths[0] if len(strengths) == 1 else 0.0
        if not strength or not self._catalog.features:
            return None
        return Smoothing(strength, strength / (int(self._catalog.train_count_V[item]) + strength))

    def _graph(self, batch: SessionBatch, clicks: SessionClicks) -> tuple[list[Node], list[Edge]]:
        """The session graph as the encoder sees it."""
        graph = batch.graph
        positions: list[list[int]] = [[] for _ in graph.node_items_N]
        for node, given in zip(graph.alias_L.tolist(), clicks.places_L, strict=True):
            positions[node].append(int(given) + 1)
        nodes = [
            Node(self._id(item), self._title(item), places)
            for item, places in zip(graph.node_items_N.tolist(), positions, strict=True)
        ]
        edges = torch.stack([graph.edge_src_E, graph.edge_dst_E, graph.edge_count_E], dim=1).tolist()
        return nodes, [Edge(*edge) for edge in edges]

    def _clicks(self, ids_C: pa.Array, clicks: SessionClicks) -> list[Click]:
        titles = [None if item < 0 else self._title(int(item)) for item in clicks.given_C]
        values = zip(ids_C.to_pylist(), titles, clicks.states, strict=True)
        return [Click(place, *value) for place, value in enumerate(values, start=1)]

    def _note(self, clicks: SessionClicks) -> str:
        if not self._has_language_model or len(clicks.places_L) <= LANGUAGE_MODEL_CLICKS:
            return ""
        return (
            f"Only the newest {LANGUAGE_MODEL_CLICKS} clicks were left out one at a time, because a language model "
            "encodes the session again each time."
        )

    def _explain_popular(self, ids_C: pa.Array, clicks: SessionClicks, k: int, wanted: Ints | None) -> Explanation:
        """Explains the fallback: the most popular items."""
        size = self._catalog.num_items
        ids_1V, shares_1V = self._ranker.rank(Jagged.empty(1), size, excludes_seen=False)
        rank_V = np.empty(size, np.int64)
        rank_V[ids_1V[0].numpy()] = np.arange(1, size + 1)
        items = ids_1V[0].numpy()[:k] if wanted is None else wanted
        explained = []
        for item in items.tolist():
            share = float(shares_1V[0][rank_V[item] - 1])
            found = ExplainedItem(
                item_id=self._id(item),
                title=self._title(item),
                rank=int(rank_V[item]),
                score=share,
                clicked_before=False,
                excluded=False,
                training_clicks=int(self._catalog.train_count_V[item]),
                smoothing=None,
                parts=[Part("popularity", share, 1.0)],
                clicks=[],
                nearest=self._nearest(item),
            )
            explained.append(replace(found, text=item_sentence(found)))
        note = "The session has no known item, so the most popular items are recommended."
        return Explanation(self._files.index.stage, True, self._clicks(ids_C, clicks), [], [], explained, note)

    def _id(self, item: int) -> Any:
        return self._catalog.item_ids[item].as_py()

    def _title(self, item: int) -> str | None:
        title: str | None = self._ranker.titles[item].as_py()
        return title
