"""Explains recommendations: the parts of their scores, and what each click of the session means for them.

Shapes: C clicks as given, L clicks that the model is shown, K items, Q columns of item vectors, V items of the catalog.
"""

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from llmgr_rec.baselines.blend import Blend, clicks_of
from llmgr_rec.baselines.knn_smoothing import neighbor_share
from llmgr_rec.baselines.reranker import DEPTH
from llmgr_rec.baselines.sparse_scores import Floats, Ints
from llmgr_rec.data.batch import RawSessions, SessionBatch
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed.ranking import EXCLUDED_RANK
from llmgr_rec.errors import UserError
from llmgr_rec.explanation.attribution import gradient_times_input, scores_without
from llmgr_rec.explanation.item_records import ItemNumbers, ItemRecords
from llmgr_rec.explanation.records import Click, Edge, Explanation, Node, Smoothing
from llmgr_rec.explanation.score_parts import PartValues, score_parts
from llmgr_rec.explanation.session_clicks import SessionClicks
from llmgr_rec.explanation.shared_words import SharedWords
from llmgr_rec.scoring.session_ranker import SessionRanker
from llmgr_rec.storage.bundle import BundleFiles, load_blend_terms

# Items of an explanation.
MOST_ITEMS = 100
# Clicks that are left out, one at a time, where each time a language model encodes the session again.
LANGUAGE_MODEL_CLICKS = 10
_NEAREST = 5


class Explainer:
    """Explains the recommendations of a loaded model. Several threads may use it at once.

    Args:
        files: The opened bundle of the model.
        ranker: The loaded model.
    """

    def __init__(self, files: BundleFiles, ranker: SessionRanker) -> None:
        self._files, self._catalog, self._ranker = files, files.catalog, ranker
        self._merges_repeats = files.index.consecutive_repeats == "merge"
        self._has_language_model = set(ranker.model.model.score_columns) != {"encoder"}

    @torch.no_grad()
    def explain(
        self, ids_C: pa.Array, k: int = 5, items: pa.Array | None = None, exclude_seen: bool | None = None
    ) -> Explanation:
        """Explains the recommendations for a session.

        Args:
            ids_C: Raw ids of the session's clicks, oldest first.
            k: Number of recommended items to explain, if no items are given.
            items: Raw ids of the items to explain, recommended or not.
            exclude_seen: As in `Recommender.recommend`.

        Raises:
            UserError: `k` or the number of items is out of range, an item is not in the catalog, or the session holds
                a null.
        """
        wanted = self._wanted(k, items)
        if nulls := pc.sum(pc.is_null(ids_C, nan_is_null=True)).as_py():
            raise UserError(f"the session holds {nulls:,} null item ids; remove them")
        indices_C = self._catalog.index_of(ids_C) if len(ids_C) else np.zeros(0, np.int64)
        clicks = SessionClicks(indices_C, self._merges_repeats, self._ranker.rule.max_length)
        excludes = self._ranker.rule.excludes_seen if exclude_seen is None else exclude_seen
        is_fallback = not len(clicks.places_L)
        batch = self._ranker.model.collate(RawSessions.to_rank(clicks.shown))
        numbers = self._popular(ids_C, k, wanted) if is_fallback else self._numbers(batch, clicks, k, wanted, excludes)
        return Explanation(
            stage=self._files.index.stage,
            fallback=is_fallback,
            clicks=self._clicks(ids_C, clicks),
            nodes=self._nodes(batch, clicks),
            edges=self._edges(batch),
            items=self._records.of(numbers, clicks),
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

    def _numbers(
        self, batch: SessionBatch, clicks: SessionClicks, k: int, wanted: Ints | None, excludes: bool
    ) -> ItemNumbers:
        """The numbers of the recommended or the given items."""
        query_1Q = self._ranker.model.queries(batch)
        items_K, ranks_K = self._ranks(batch, query_1Q, clicks.shown if excludes else None, k, wanted)
        items_KQ = self._ranker.catalog_ranker.item_vectors[torch.from_numpy(items_K)]
        parts = score_parts(self._ranker.model, self._terms, query_1Q, clicks.items_L, items_KQ, items_K)
        gradient_LK = gradient_times_input(self._ranker.model, torch.from_numpy(clicks.items_L), items_KQ)
        left_out_LK = self._left_out(clicks, parts, items_KQ, items_K)
        if self._ranker.model.reranker is not None:
            exclude = clicks.shown if excludes else None
            ranks_K, added_K = self._reranked(batch, query_1Q, exclude, items_K, ranks_K, parts)
            parts.append(PartValues("reranker", added_K))
        return ItemNumbers(items_K, ranks_K, parts, left_out_LK, gradient_LK, self._nearest(items_K))

    def _reranked(
        self,
        batch: SessionBatch,
        query_1Q: Tensor,
        exclude: Jagged | None,
        items_K: Ints,
        ranks_K: Ints,
        parts: list[PartValues],
    ) -> tuple[Ints, Floats]:
        """Ranks of items, and what the re-ranker adds to their scores: 0 to those that it does not see."""
        ids_1D, scores_1D = self._ranker.catalog_ranker.rank(query_1Q, DEPTH, exclude, clicks_of(batch))
        place_of = {item: place for place, item in enumerate(ids_1D[0].tolist()) if item >= 0}
        ranks_K, added_K = ranks_K.copy(), np.zeros(len(items_K))
        for number, item in enumerate(items_K.tolist()):
            if (place := place_of.get(item)) is not None:
                ranks_K[number] = place + 1
                added_K[number] = scores_1D[0, place].item() - sum(part.values_K[number] for part in parts)
        return ranks_K, added_K

    def _ranks(
        self, batch: SessionBatch, query_1Q: Tensor, exclude: Jagged | None, k: int, wanted: Ints | None
    ) -> tuple[Ints, Ints]:
        """Items to explain and the rank of each, from 1; 0 for an excluded item."""
        ranker, blend, clicks = self._ranker.catalog_ranker, self._ranker.model.blend, clicks_of(batch)
        if wanted is None:
            ids_1K, _ = ranker.rank(query_1Q, min(k, self._catalog.num_items), exclude, clicks)
            items_K = ids_1K[0][ids_1K[0] >= 0].numpy()
            return items_K, np.arange(1, len(items_K) + 1)
        rows_K = torch.zeros(len(wanted), dtype=torch.int64)
        added = [] if blend is None else [ranker.added_by(blend, clicks)[rows_K.numpy()]]
        exclude_K = None if exclude is None else exclude.select(rows_K)
        weights = [[1.0] * len(added)]
        ranks_1K = ranker.target_ranks(query_1Q[rows_K], torch.from_numpy(wanted), added, weights, exclude_K)
        ranks_K = ranks_1K[0].numpy()
        return wanted, np.where(ranks_K == EXCLUDED_RANK, 0, ranks_K + 1)

    def _left_out(self, clicks: SessionClicks, parts: list[PartValues], items_KQ: Tensor, items_K: Ints) -> Floats:
        """Scores minus the scores without each click, [L, K]; NaN for clicks that are not left out."""
        left_out_LK = np.full((len(clicks.places_L), len(items_K)), np.nan)
        count = len(clicks.places_L)
        if self._has_language_model:
            count = min(count, LANGUAGE_MODEL_CLICKS)
        score_K = np.sum([part.values_K for part in parts], axis=0)
        without_LK = scores_without(self._ranker.model, clicks.left_out(count), items_KQ, items_K)
        left_out_LK[-count:] = score_K - without_LK
        return left_out_LK

    def _nearest(self, items_K: Ints) -> list[list[tuple[int, float]]]:
        """The nearest items of each item, with their cosines."""
        ids, cosines = self._ranker.similar(torch.from_numpy(items_K), min(_NEAREST, self._catalog.num_items))
        rows = zip(ids.tolist(), cosines.tolist(), strict=True)
        return [[pair for pair in zip(*row, strict=True) if pair[0] >= 0] for row in rows]

    def _popular(self, ids_C: pa.Array, k: int, wanted: Ints | None) -> ItemNumbers:
        """The numbers of the most popular or the given items, for a session without a known item."""
        size = self._catalog.num_items
        domain_B = self._ranker.domains(pa.chunked_array([pa.array([ids_C.to_pylist()], pa.list_(ids_C.type))]))
        ids_1V, shares_1V = self._ranker.rank(Jagged.empty(1), size, excludes_seen=False, domain_B=domain_B)
        listed = ids_1V[0].numpy()
        listed = listed[listed >= 0]
        # -1 is the place of an item of another domain, whose rank is 0.
        places_V = np.full(size, -1)
        places_V[listed] = np.arange(len(listed))
        items_K = listed[:k] if wanted is None else wanted
        shares_K = np.append(shares_1V[0].double().numpy()[: len(listed)], 0.0)[places_V[items_K]]
        nothing = np.zeros((0, len(items_K)))
        parts = [PartValues("popularity", shares_K)]
        return ItemNumbers(items_K, places_V[items_K] + 1, parts, nothing, None, self._nearest(items_K))

    def _nodes(self, batch: SessionBatch, clicks: SessionClicks) -> list[Node]:
        """The nodes of the session graph, as the encoder sees it."""
        positions: list[list[int]] = [[] for _ in batch.graph.node_items_N]
        for node, given in zip(batch.graph.alias_L.tolist(), clicks.places_L, strict=True):
            positions[node].append(int(given) + 1)
        items = batch.graph.node_items_N.tolist()
        return [Node(*self._name(item), places) for item, places in zip(items, positions, strict=True)]

    def _edges(self, batch: SessionBatch) -> list[Edge]:
        graph = batch.graph
        edges = torch.stack([graph.edge_src_E, graph.edge_dst_E, graph.edge_count_E], dim=1)
        return [Edge(*edge) for edge in edges.tolist()]

    def _clicks(self, ids_C: pa.Array, clicks: SessionClicks) -> list[Click]:
        titles = [None if item < 0 else self._name(int(item))[1] for item in clicks.given_C]
        values = zip(ids_C.to_pylist(), titles, clicks.states, strict=True)
        return [Click(place, *value) for place, value in enumerate(values, start=1)]

    def _note(self, clicks: SessionClicks) -> str:
        said = []
        if unknown := int((clicks.given_C < 0).sum()):
            said.append(f"{unknown:,} of {len(clicks.given_C):,} clicks are on items that are not in the catalog.")
        if not len(clicks.places_L):
            said.append("The session has no known item, so the most popular items are recommended.")
        if self._has_language_model and len(clicks.places_L) > LANGUAGE_MODEL_CLICKS:
            said.append(
                f"Only the newest {LANGUAGE_MODEL_CLICKS} clicks were left out one at a time, because a language model "
                "encodes the session again each time."
            )
        return " ".join(said)

    def _name(self, item: int) -> tuple[Any, str | None]:
        """Raw id and title."""
        return self._catalog.item_ids[item].as_py(), self._ranker.titles[item].as_py()

    @cached_property
    def _terms(self) -> tuple[Blend, ...]:
        """The blend of each baseline; all in one if an earlier version wrote the bundle."""
        blend = self._ranker.model.blend
        return () if blend is None else load_blend_terms(self._files) or (blend,)

    @cached_property
    def _records(self) -> ItemRecords:
        counts_V = self._catalog.train_count_V
        # A part that compares words asks for them, so that a model without it does not split the texts of all items.
        return ItemRecords(
            self._name, lambda item: int(counts_V[item]), self._smoothing, lambda one, other: self._words.of(one, other)
        )

    def _smoothing(self, item: int) -> Smoothing | None:
        strength = self._files.config.tables.knn_smoothing[0]
        # Where no item has a neighbor, none is smoothed.
        if not strength or not self._words.has_neighbors_V.any():
            return None
        has_neighbors = torch.tensor(bool(self._words.has_neighbors_V[item]))
        return Smoothing(strength, float(neighbor_share(has_neighbors, self._catalog.train_count_V[item], strength)))

    @cached_property
    def _words(self) -> SharedWords:
        return SharedWords(self._catalog)
