"""The session recommender: item tables, a session encoder and a score; the backbone that LLMGR builds on.

Shapes: B sessions, N nodes, C candidates, X = N + C bags, D = d1 columns, Q columns of queries and items (here D), H
columns of a text encoding.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.modules.item_tables import ItemRows, ItemTables
from llmgr_rec.modules.item_text import ItemText
from llmgr_rec.modules.session_encoder import EncodedSessions, SessionEncoder

torch.fx.wrap("encode_prefixes")
torch.fx.wrap("normalise")

# As in torch.nn.functional.normalize: shorter vectors are divided by this.
_LEAST_NORM = 1e-12


class _Normalise(torch.autograd.Function):
    """Rows divided by their lengths; torch's own takes twice as many passes over a catalogue in its backward pass."""

    @staticmethod
    def forward(ctx: Any, vectors_XD: Tensor) -> Tensor:
        norms_X1 = torch.linalg.vector_norm(vectors_XD, dim=1, keepdim=True)
        inverse_X1 = norms_X1.clamp(min=_LEAST_NORM).reciprocal()
        units_XD = vectors_XD * inverse_X1
        ctx.save_for_backward(units_XD, inverse_X1, norms_X1 > _LEAST_NORM)
        return units_XD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> Tensor:
        units_XD, inverse_X1, is_unit_X1 = ctx.saved_tensors
        along_X1 = torch.linalg.vecdot(grad_XD, units_XD).unsqueeze(1) * is_unit_X1
        return torch.addcmul(grad_XD, units_XD, along_X1, value=-1).mul_(inverse_X1)


def normalise(vectors_XD: Tensor) -> Tensor:
    """Divides rows by their lengths.

    Args:
        vectors_XD: Vectors; those of length 0 stay.
    """
    return _Normalise.apply(vectors_XD)


def encode_prefixes(
    encoder: SessionEncoder, nodes_ND: Tensor, graph: SessionGraph, groups_G1: Tensor
) -> EncodedSessions:
    """`SessionEncoder.encode_prefixes` as a function, which symbolic tracing does not enter."""
    return encoder.encode_prefixes(nodes_ND, graph, groups_G1)


@dataclass
class Recommended:
    """All that one lookup of a batch gives.

    Args:
        queries_BQ: Query of each session: a score is the dot product of a query and an item's vector.
        candidates_CQ: Vectors of the batch's candidate items, on the items' side of that product.
        states_ND: Encoder states of the nodes.
        rows_ND: Item vectors of the nodes as looked up.
        sessions_BD: Session vectors before they became queries.
        candidate_ids_CD: Bare id rows of the candidates.
        candidate_texts_CH: Text encodings of the candidates, where item vectors have them.
    """

    queries_BQ: Tensor
    candidates_CQ: Tensor
    states_ND: Tensor
    rows_ND: Tensor
    sessions_BD: Tensor
    candidate_ids_CD: Tensor
    candidate_texts_CH: Tensor | None = None


class SessionRecommender(nn.Module):
    """Scores items for sessions.

    Args:
        item_tables: The item tables.
        encoder: The session encoder.
        score: `dot`, or `cosine` divided by the temperature.
        temperature: Divisor of the cosine; ignored for dot.
        item_text: Texts as a part of item vectors; None where they have none.
    """

    def __init__(
        self,
        item_tables: ItemTables,
        encoder: SessionEncoder,
        score: Literal["dot", "cosine"],
        temperature: float,
        item_text: ItemText | None = None,
    ) -> None:
        super().__init__()
        self.item_tables = item_tables
        self.encoder = encoder
        self.score = score
        self.temperature = temperature
        self.item_text = item_text

    def forward(self, batch: SessionBatch, one_pass: bool = False) -> Recommended:
        """Encodes the sessions and prepares the candidates from one lookup.

        Args:
            batch: Its features hold a bag for each node, then one for each candidate.
            one_pass: Encode growing prefixes, of which the batch says where they begin, from the longest of them alone.

        Returns:
            Queries, candidates and what they were made of.
        """
        rows = self.rows(batch.features)
        num_nodes = batch.graph.node_items_N.shape[0]
        # Two slices would each give a gradient of the whole; a split gives one.
        rows_ND, candidates_CD = rows.vectors_XD.split([num_nodes, rows.vectors_XD.shape[0] - num_nodes])
        if one_pass:
            encoded = encode_prefixes(self.encoder, rows_ND, batch.graph, batch.prompts_G1)
        else:
            encoded = self.encoder(rows_ND, batch.graph)
        return Recommended(
            queries_BQ=self.as_queries(encoded.sessions_BD),
            candidates_CQ=self.as_items(candidates_CD),
            states_ND=encoded.states_ND,
            rows_ND=rows_ND,
            sessions_BD=encoded.sessions_BD,
            candidate_ids_CD=rows.ids_XD[num_nodes:],
            candidate_texts_CH=None if rows.texts_XH is None else rows.texts_XH[num_nodes:],
        )

    def rows(self, features: KeyedJaggedTensor) -> ItemRows:
        """Looks up items: their vectors and what these are made of.

        Args:
            features: A bag for each of the X occurrences, under the keys of the item tables and of the item text.
        """
        rows = self.item_tables.rows(features)
        if self.item_text is None:
            return rows
        texts_XH = self.item_text(features)
        return ItemRows(rows.vectors_XD + self.item_text.project(texts_XH), rows.ids_XD, texts_XH)

    def encode(self, features: KeyedJaggedTensor, graph: SessionGraph) -> EncodedSessions:
        """Encodes sessions.

        Args:
            features: A bag for each node; bags after them are ignored.
            graph: The sessions' graphs.

        Returns:
            Node states and session vectors.
        """
        return self.encoder(self.rows(features).vectors_XD[: graph.node_items_N.shape[0]], graph)

    def queries(self, batch: SessionBatch) -> Tensor:
        """Makes the queries of a batch, [B, Q]."""
        return self.as_queries(self.encode(batch.features, batch.graph).sessions_BD)

    def item_vectors(self, features: KeyedJaggedTensor) -> Tensor:
        """Makes the items' side of the score for one bag an item, [C, Q]: scores are queries @ items.T."""
        return self.as_items(self.rows(features).vectors_XD)

    def as_queries(self, sessions_BD: Tensor) -> Tensor:
        """Turns session vectors into queries, [B, Q]."""
        return normalise(sessions_BD) / self.temperature if self.score == "cosine" else sessions_BD

    def as_items(self, vectors_CD: Tensor) -> Tensor:
        """Turns looked-up item vectors into the items' side of the score, [C, Q]."""
        return normalise(vectors_CD) if self.score == "cosine" else vectors_CD
