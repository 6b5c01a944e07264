"""Ranks the catalog for sessions in memory, as `score` does for sessions in files.

Shapes: B sessions, L clicks, R items that may be recommended, V items of the catalog, K places of a list, Q columns of
item vectors.
"""

import functools
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from llmgr_rec.arrow_input import to_ids
from llmgr_rec.baselines.knn import Popularity
from llmgr_rec.config import ALL_DOMAINS, DType, TableDType
from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.graph import build_graphs
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.ranking import CatalogRanker
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.exclusion import ranking_rule
from llmgr_rec.kernels.topk import top_k
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.prepare_for_inference import fold_weights, prepare_for_inference
from llmgr_rec.scoring.click_lists import flat_clicks, known_clicks
from llmgr_rec.scoring.ranked_lists import list_columns
from llmgr_rec.scoring.sample_sessions import sample_sessions
from llmgr_rec.storage.bundle import BundleFiles, load_model

# Sessions that are encoded at once.
_BATCH = 256
# Sample sessions that the recall of an index is measured with.
_SAMPLES = 256


class SessionRanker:
    """A loaded model that ranks items for sessions in this process; several threads may use it at once.

    Args:
        files: The opened bundle of the model.
        dtype: Number format of the language model, if there is one; None uses the setting of the run.
        index: Share of the best 20 items that an approximate index finds, above 0 and at most 1; None ranks exactly.
        table_dtype: Number format of the embedding tables in memory; None takes that of the bundle.

    Attributes:
        bundle: The loaded bundle.
        catalog: The items.
        titles: Title of each item, string [V]; null for an item without one.
        rule: What a ranking shows and excludes of a session.
        model: The model with its collator and blend.
        catalog_ranker: Ranks the catalog for queries.
        index_recall: Share of the best 20 items that the index finds for sample sessions; None without an index.

    Raises:
        UserError: Weights are damaged, or an index is wanted and faiss is not installed.
    """

    def __init__(
        self,
        files: BundleFiles,
        dtype: DType | None = None,
        index: float | None = None,
        table_dtype: TableDType | None = None,
    ) -> None:
        self.bundle = load_model(files, dtype=dtype, table_dtype=table_dtype)
        if isinstance(self.bundle.model, LLMGR):
            prepare_for_inference(self.bundle.model.language_model)
        self.catalog = self.bundle.catalog
        self.titles = pa.array(self.catalog.titles(), pa.string())
        self.rule = ranking_rule(files.index)
        self.model = self.bundle.ranking(_BATCH)
        fold_weights(self.bundle.model)
        self.catalog_ranker = self.model.ranker(World.alone(), keep=True)
        self._encoder = self.model.with_query_encoder(self.catalog_ranker).query_encoder
        self.catalog_ranker.prepare_for_few_sessions()
        self.index_recall = None if index is None else self._prepare_index(index)
        self._merges_repeats = files.index.consecutive_repeats == "merge"
        self._popularity = Popularity(self.catalog.train_count_V.numpy())

    def clicks(self, lists: pa.ChunkedArray) -> Jagged:
        """Item indices of the clicks that the model is shown: the newest ones on known items.

        Args:
            lists: Item ids of each session, oldest click first.

        Raises:
            UserError: An id is null or has a type that the catalog's ids do not have.
        """
        ids_L, offsets_B1, nulls = flat_clicks(lists)
        if nulls:
            raise UserError(f"sessions hold {nulls:,} null item ids; remove them")
        clicks = Jagged(*map(torch.from_numpy, known_clicks(self.catalog.index_of(ids_L), offsets_B1)))
        if self._merges_repeats:
            clicks = clicks.without_consecutive_repeats()
        return clicks.last(self.rule.max_length)

    def domains(self, lists: pa.ChunkedArray) -> Tensor | None:
        """Domain of each session, whose popular items it gets without a known item; None for a catalog of one log.

        Args:
            lists: As for `clicks`.
        """
        if self.catalog.domains is None:
            return None
        return torch.from_numpy(self.catalog.domains.of_ids(*flat_clicks(lists)[:2]))

    def allowed_items(
        self,
        among: Collection[Any] | None,
        without: Collection[Any],
        category: str | None,
        domain: str | None = None,
    ) -> Tensor | None:
        """Item indices that may be recommended, ascending, int64 [R]; None if all may.

        Args:
            among: Ids that may be recommended; None allows all. Unknown ids are ignored, here and in `without`.
            without: Ids that may not.
            category: Only items of this category, or of one below it.
            domain: Only items of this domain; None and `ALL_DOMAINS` allow those of all.

        Raises:
            UserError: Ids have a wrong type, or no item has the category or the domain.
        """
        removed_ids = to_ids(without, "without")
        of_domain_V = self._of_domain(domain)
        if among is None and not len(removed_ids) and category is None and of_domain_V is None:
            return None
        is_allowed_V = np.ones(self.catalog.num_items, bool)
        if among is not None:
            chosen = self.catalog.index_of(to_ids(among, "among"))
            is_allowed_V = np.isin(np.arange(len(is_allowed_V)), chosen)
        if len(removed_ids):
            removed = self.catalog.index_of(removed_ids)
            is_allowed_V[removed[removed >= 0]] = False
        if category is not None:
            is_allowed_V &= self.catalog.in_category(category)
        if of_domain_V is not None:
            is_allowed_V &= of_domain_V
        return torch.from_numpy(np.flatnonzero(is_allowed_V))

    def _of_domain(self, domain: str | None) -> np.ndarray | None:
        if domain is None or domain == ALL_DOMAINS:
            return None
        domains = self.catalog.domains
        if domains is None:
            raise UserError(f"domain is {domain!r}, but the model was trained on the log of one domain; leave it out")
        return (domains.of_item_V == domains.place(domain)).numpy()

    def rank(
        self,
        clicks: Jagged,
        k: int,
        excludes_seen: bool,
        allowed_R: Tensor | None = None,
        domain: str | None = None,
        domain_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Finds the K best items of each session; for a session without clicks, the most popular ones.

        Args:
            clicks: From `clicks`.
            k: Length K of a list, at most the number of items.
            excludes_seen: Whether the items of the clicks are left out.
            allowed_R: From `allowed_items`.
            domain: As for `allowed_items`; None ranks the items of the domain of each session.
            domain_B: From `domains`; None takes popular items of all domains for sessions without clicks.

        Returns:
            Item indices, int64 [B, K], best first, and their scores, float32; a list ends before the first negative
            index.
        """
        ranker = self.catalog_ranker if allowed_R is None else self.catalog_ranker.among(allowed_R)
        if domain is not None:
            ranker = ranker.over_all()
        is_known_B = clicks.lengths > 0
        if is_known_B.all() and 0 < clicks.num_rows <= _BATCH:
            return self._ranked(ranker, clicks, k, excludes_seen)
        ids_BK, scores_BK = (row_K.repeat(clicks.num_rows, 1) for row_K in self._popular(k, allowed_R))
        if domain is None and domain_B is not None and self.catalog.domains is not None:
            for place in domain_B[~is_known_B & (domain_B >= 0)].unique().tolist():
                items = self.catalog.domains.items(place)
                items = items if allowed_R is None else items[torch.isin(items, allowed_R)]
                ids_BK[domain_B == place], scores_BK[domain_B == place] = self._popular(k, items)
        for known in is_known_B.nonzero().squeeze(1).split(_BATCH):
            if known.numel():
                ids_BK[known], scores_BK[known] = self._ranked(ranker, clicks.select(known), k, excludes_seen)
        return ids_BK, scores_BK

    def similar(self, indices_B: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Finds the K items with the most similar vectors, without the item itself.

        Args:
            indices_B: Item indices, int64.
            k: Length K of a list, at most the number of items.

        Returns:
            As `rank`; scores are cosine similarities.
        """
        itself = Jagged.from_lengths(indices_B, torch.ones_like(indices_B))
        return top_k(self.unit_vectors[indices_B], self.unit_vectors, k, itself)

    @functools.cached_property
    def unit_vectors(self) -> Tensor:
        """Item vectors of length 1, [V, Q]; made when similar items are first asked for."""
        return torch.nn.functional.normalize(self.catalog_ranker.item_vectors, dim=1)

    def lists(self, ids_BK: Tensor, scores_BK: Tensor) -> dict[str, pa.Array]:
        """The columns `item_ids`, `titles` and `scores` of ranked lists.

        Args:
            ids_BK: Item indices, best first; a list ends before the first negative one.
            scores_BK: Their scores.
        """
        values = {"item_ids": self.catalog.item_ids, "titles": self.titles}
        return list_columns(values, ids_BK.numpy(), scores_BK.numpy(), is_large=True)

    @torch.no_grad()
    def _prepare_index(self, recall: float) -> float | None:
        samples = sample_sessions(self.catalog.train_count_V.numpy(), self.model.blend, _SAMPLES)
        return self.catalog_ranker.prepare_index(self._queries_of(samples), recall)

    @torch.no_grad()
    def _ranked(self, ranker: CatalogRanker, clicks: Jagged, k: int, excludes_seen: bool) -> tuple[Tensor, Tensor]:
        """The K best items of each session of a batch, none of them empty: as `CatalogRanker.rank`."""
        return ranker.rank(self._queries_of(clicks), k, clicks if excludes_seen else None, clicks)

    def _queries_of(self, clicks: Jagged) -> Tensor:
        if self._encoder is not None:
            graph = build_graphs(clicks.values, clicks.offsets, self.catalog.num_items)
            return self._encoder.queries(graph.to(self.catalog_ranker.item_vectors.device))
        return self.model.queries(self.model.collate(RawSessions.to_rank(clicks)))

    def _popular(self, k: int, allowed_R: Tensor | None) -> tuple[Tensor, Tensor]:
        """The K most popular items that may be recommended, and their shares of all clicks; padded with -1 and -inf."""
        size = self.catalog.num_items if allowed_R is not None else k
        ids, shares = self._popularity.rank(np.zeros(0, np.int64), np.zeros(2, np.int64), size)
        ids_R, shares_R = torch.from_numpy(ids[0]), torch.from_numpy(shares[0]).float()
        if allowed_R is not None:
            is_allowed_R = torch.isin(ids_R, allowed_R)
            ids_R, shares_R = ids_R[is_allowed_R][:k], shares_R[is_allowed_R][:k]
        missing = (0, k - len(ids_R))
        pad = torch.nn.functional.pad
        return pad(ids_R, missing, value=-1), pad(shares_R, missing, value=float("-inf"))
