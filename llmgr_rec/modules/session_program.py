"""A trained session recommender as one module of tensors, from clicked items to ranked items, for `torch.export`.

What does not depend on the sessions is computed before: the vectors of all items, the similarities of the blend, and
the most popular items.

Shapes: B sessions, L clicks, N nodes, V items of the catalog, D columns of item vectors, K items of a list, S similar
items of all items, E of those of all clicks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.data.graph_operators import build_graphs_by_operators, newest_known, rows_of
from llmgr_rec.kernels.topk import scores_of, sort_keys
from llmgr_rec.modules.session_encoder import SessionEncoder


@dataclass(frozen=True)
class ItemSimilarities:
    """The sparse similarities of a blend by clicked item, see `baselines.blend.Blend`.

    Args:
        offsets_V1: First similar item of each item, int64.
        items_S: Similar items, int64.
        values_S: Their similarities, float32.
        decay: Weight of a click relative to the click after it.
    """

    offsets_V1: Tensor
    items_S: Tensor
    values_S: Tensor
    decay: float


class SessionProgram(nn.Module):
    """Ranks the catalog for sessions, with the scores of the recommender that it is made from.

    Args:
        encoder: The session encoder.
        as_query: Makes queries [B, D] of session vectors [B, D].
        vectors_VD: Vectors of the items that the encoder takes.
        items_VD: Vectors of the items that scores are computed with.
        popular_K: Most popular items, which sessions without a known click get; their number is that of the list.
        shares_K: Their scores.
        max_length: Newest known clicks of a session that are encoded.
        merges_repeats: Whether a click on the item clicked just before is dropped.
        excludes_seen: Whether the items of the encoded clicks are left out of the list.
        similarities: Similarities of a blend; None without one.
    """

    vectors_VD: Tensor
    items_VD: Tensor
    popular_K: Tensor
    shares_K: Tensor
    similar_offsets_V1: Tensor
    similar_items_S: Tensor
    similar_values_S: Tensor

    def __init__(
        self,
        encoder: SessionEncoder,
        as_query: Callable[[Tensor], Tensor],
        vectors_VD: Tensor,
        items_VD: Tensor,
        popular_K: Tensor,
        shares_K: Tensor,
        max_length: int,
        merges_repeats: bool,
        excludes_seen: bool,
        similarities: ItemSimilarities | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.as_query = as_query
        self.max_length = max_length
        self.merges_repeats = merges_repeats
        self.excludes_seen = excludes_seen
        self.register_buffer("vectors_VD", vectors_VD)
        self.register_buffer("items_VD", items_VD)
        self.register_buffer("popular_K", popular_K)
        self.register_buffer("shares_K", shares_K)
        self.decay: float | None = None
        if similarities is not None:
            self.decay = similarities.decay
            self.register_buffer("similar_offsets_V1", similarities.offsets_V1)
            self.register_buffer("similar_items_S", similarities.items_S)
            self.register_buffer("similar_values_S", similarities.values_S)

    def forward(self, items_L: Tensor, offsets_B1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ranks the catalog.

        Args:
            items_L: Item index of each click, oldest first, int64; -1 for an item that is not in the catalog.
            offsets_B1: First click of each session and, last, L, int64.

        Returns:
            Item indices, int64 [B, K], and scores, float32 [B, K], best first, padded with -1 and -inf where fewer
            than K items are left; and whether a session got the most popular items, bool [B].
        """
        num_items, num_sessions = self.items_VD.shape[0], offsets_B1.shape[0] - 1
        clicked_L, session_L = newest_known(items_L, offsets_B1, num_items, self.max_length, self.merges_repeats)
        graph = build_graphs_by_operators(clicked_L, session_L, num_sessions, num_items)
        encoded = self.encoder(self.vectors_VD.index_select(0, graph.node_items_N), graph)
        scores_BV = self.as_query(encoded.sessions_BD).float() @ self.items_VD.T
        if self.decay is not None:
            scores_BV = scores_BV + self._added(clicked_L, session_L, graph, self.decay)
        if self.excludes_seen:
            seen_N = graph.node_session_N * num_items + graph.node_items_N
            scores_BV = scores_BV.flatten().index_fill(0, seen_N, float("-inf")).view(num_sessions, num_items)
        # Keys are distinct, so equal scores are in order of item index.
        keys_BV = sort_keys(scores_BV, torch.arange(num_items, device=items_L.device))
        keys_BK = torch.topk(keys_BV, self.popular_K.shape[0], dim=1, largest=False).values
        ids_BK, scores_BK = keys_BK & 0x7FFFFFFF, scores_of(keys_BK)
        ids_BK = torch.where(scores_BK.isneginf(), -1, ids_BK)
        fallback_B = graph.click_offsets_B1.diff() == 0
        ids_BK = torch.where(fallback_B.unsqueeze(1), self.popular_K, ids_BK)
        return ids_BK, torch.where(fallback_B.unsqueeze(1), self.shares_K, scores_BK), fallback_B

    def _added(self, clicked_L: Tensor, session_L: Tensor, graph: SessionGraph, decay: float) -> Tensor:
        """Scores that the blend adds, [B, V]: those of each click's similar items, see `Blend.scores`."""
        num_items, num_clicks = self.items_VD.shape[0], clicked_L.shape[0]
        ends_L = graph.click_offsets_B1.index_select(0, session_L + 1)
        after_L = ends_L - 1 - torch.arange(num_clicks, device=clicked_L.device)
        # In double precision as in `recency_weights`.
        weight_L = torch.pow(decay, after_L.double()).float()
        first_L = self.similar_offsets_V1.index_select(0, clicked_L)
        counts_L = self.similar_offsets_V1.index_select(0, clicked_L + 1) - first_L
        starts_L1 = torch.cat([counts_L.new_zeros(1), counts_L.cumsum(0)])
        num_entries = cast(int, starts_L1[-1].item())
        torch._check(num_entries >= 0)
        click_E = rows_of(starts_L1, num_entries)
        entry_E = (first_L - starts_L1[:-1]).index_select(0, click_E) + torch.arange(num_entries)
        terms_E = weight_L.index_select(0, click_E) * self.similar_values_S.index_select(0, entry_E)
        place_E = session_L.index_select(0, click_E) * num_items + self.similar_items_S.index_select(0, entry_E)
        added = terms_E.new_zeros(graph.num_sessions * num_items)
        return added.index_add(0, place_E, terms_E).view(graph.num_sessions, num_items)
