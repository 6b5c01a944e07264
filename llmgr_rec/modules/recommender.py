"""The session recommender: item tables, a session encoder and a score; also the frozen backbone of LLMGR.

Shapes: B sessions, N nodes, C candidates, X = N + C bags, D = d1 columns, K columns of the text encoder, Q columns of
queries and item vectors (D, or D + K).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.collate import ITEM_ID
from llmgr_rec.data.graph import SessionGraph, nodes_of_longest
from llmgr_rec.modules.item_tables import ItemRows, ItemTables
from llmgr_rec.modules.normalize import normalize
from llmgr_rec.modules.session_encoder import EncodedSessions, SessionEncoder
from llmgr_rec.modules.text_sequence_encoder import TextSequenceEncoder
from llmgr_rec.modules.whole_catalog import WholeCatalog

torch.fx.wrap("encode_one_pass")
torch.fx.wrap("encode_prefixes")
torch.fx.wrap("items_of_longest")
torch.fx.wrap("normalize")


def encode_one_pass(encoder: SessionEncoder, nodes_MD: Tensor, graph: SessionGraph, pass_offsets_P1: Tensor) -> Tensor:
    """`SessionEncoder.encode_one_pass` as a function that symbolic tracing does not enter."""
    return encoder.encode_one_pass(nodes_MD, graph, pass_offsets_P1)


def encode_prefixes(encoder: SessionEncoder, nodes_ND: Tensor, graph: SessionGraph, pass_offsets_P1: Tensor) -> Tensor:
    """`SessionEncoder.encode_prefixes` as a function that symbolic tracing does not enter."""
    return encoder.encode_prefixes(nodes_ND, graph, pass_offsets_P1)


def items_of_longest(graph: SessionGraph, pass_offsets_P1: Tensor) -> Tensor:
    """Items of the nodes of the longest prefix of each pass, [M], as the bags of a batch for one pass have them."""
    return graph.node_items_N[nodes_of_longest(graph, pass_offsets_P1).values]


@dataclass
class RecommenderOutput:
    """Output of the session recommender for a batch.

    Args:
        queries_BQ: Query of each session; a score is the dot product of a query and an item vector.
        candidates_CQ: Item vectors of the batch's candidates.
        states_ND: Encoder states of the nodes.
        rows_ND: Item table vectors of the nodes.
        sessions_BD: Session vectors, from which the queries are computed.
        candidate_ids_CD: Rows of the id table of the candidates.
    """

    queries_BQ: Tensor
    candidates_CQ: Tensor
    states_ND: Tensor
    rows_ND: Tensor
    sessions_BD: Tensor
    candidate_ids_CD: Tensor


class SessionRecommender(nn.Module):
    """Scores items for sessions by the dot product or cosine of session vector and item vector.

    Args:
        item_tables: The item tables.
        encoder: The session encoder.
        score: `dot`, or `cosine` divided by the temperature.
        temperature: Divisor of the cosine; ignored for `dot`.
        text_tables: Item vectors of the text encoder, see `text_tables`; required with a text encoder.
        text_encoder: Encodes sessions as texts of their items; its score is added. None adds none.
    """

    def __init__(
        self,
        item_tables: ItemTables,
        encoder: SessionEncoder,
        score: Literal["dot", "cosine"],
        temperature: float,
        text_tables: EmbeddingBagCollection | None = None,
        text_encoder: TextSequenceEncoder | None = None,
    ) -> None:
        super().__init__()
        self.item_tables = item_tables
        self.encoder = encoder
        self.score = score
        self.temperature = temperature
        self.text_tables = text_tables
        self.text_encoder = text_encoder

    def forward(
        self,
        batch: SessionBatch,
        one_pass: bool = False,
        catalog: WholeCatalog | None = None,
        shares_states: bool = False,
    ) -> RecommenderOutput:
        """Encodes the sessions and the candidates of a batch with one lookup.

        Args:
            batch: Its features contain a bag for each node, then one for each candidate.
            one_pass: Whether to encode all prefixes of a pass at once, see `SessionEncoder.encode_one_pass`. The
                features then have bags of the nodes of the longest prefixes only, and the output has no node states.
            catalog: Makes the vectors of all items, which are the candidates, from the rows of the tables; the batch
                then looks up each row once, see `Collator.with_table_rows`. None takes the bags of the batch.
            shares_states: Whether the sessions are all prefixes of the batch's passes, with bags of all their nodes, so
                that the encoder may share work between them, see `SessionEncoder.encode_prefixes`. The output has no
                node states.

        Returns:
            Queries and candidates, and the vectors that they are computed from.
        """
        if catalog is not None:
            return self._from_catalog(batch, one_pass, catalog)
        rows = self.rows(batch.features)
        num_rows, num_nodes = rows.vectors_XD.shape[0], batch.graph.node_items_N.shape[0]
        if one_pass:
            num_nodes = num_rows - batch.candidates_C.shape[0]
        # The backward pass of two slices allocates two full gradients, that of a split only one.
        rows_ND, candidates_CD = rows.vectors_XD.split([num_nodes, num_rows - num_nodes])
        encoded = self._encode(rows_ND, batch, one_pass, shares_states)
        queries_BQ, candidates_CQ = self.as_query(encoded.sessions_BD), self._as_item(candidates_CD)
        if self.text_encoder is not None:
            text = self.text_encoder(rows.texts_XH, batch)
            queries_BQ, candidates_CQ = torch.cat([queries_BQ, text[0]], 1), torch.cat([candidates_CQ, text[1]], 1)
        return RecommenderOutput(
            queries_BQ=queries_BQ,
            candidates_CQ=candidates_CQ,
            states_ND=encoded.states_ND,
            rows_ND=rows_ND,
            sessions_BD=encoded.sessions_BD,
            candidate_ids_CD=rows.ids_XD[num_nodes:],
        )

    def _encode(
        self, rows_ND: Tensor, batch: SessionBatch, one_pass: bool, shares_states: bool = False
    ) -> EncodedSessions:
        if one_pass or shares_states:
            encode = encode_one_pass if one_pass else encode_prefixes
            sessions_BD = encode(self.encoder, rows_ND, batch.graph, batch.pass_offsets_P1)
            return EncodedSessions(rows_ND[:0], sessions_BD)
        encoded: EncodedSessions = self.encoder(rows_ND, batch.graph)
        return encoded

    def _from_catalog(self, batch: SessionBatch, one_pass: bool, catalog: WholeCatalog) -> RecommenderOutput:
        rows = self.item_tables.ebc(batch.features)
        node_items = batch.graph.node_items_N
        if one_pass:
            node_items = items_of_longest(batch.graph, batch.pass_offsets_P1)
        # Not unpacked: symbolic tracing does not know how many there are.
        vectors = catalog(rows, node_items)
        encoded = self._encode(vectors[1], batch, one_pass)
        return RecommenderOutput(
            queries_BQ=self.as_query(encoded.sessions_BD),
            candidates_CQ=self._as_item(vectors[0]),
            states_ND=encoded.states_ND,
            rows_ND=vectors[1],
            sessions_BD=encoded.sessions_BD,
            candidate_ids_CD=rows[ITEM_ID][: catalog.num_items],
        )

    def encode_texts(self, batch: SessionBatch) -> tuple[Tensor, Tensor]:
        """Queries [B, K] and candidate vectors [C, K] of the text encoder only.

        Raises:
            ValueError: There is no text encoder.
        """
        if self.text_tables is None or self.text_encoder is None:
            raise ValueError("the recommender was built without a text encoder")
        with torch.no_grad():
            texts_XK = self.text_tables(batch.features).values()
        text = self.text_encoder(texts_XK, batch)
        return text[0], text[1]

    @property
    def score_columns(self) -> dict[str, int]:
        """Number of columns of queries and item vectors that belong to each part of the score, in their order."""
        columns = {"encoder": self.item_tables.dim}
        return columns if self.text_encoder is None else {**columns, "text_encoder": self.text_encoder.dim}

    def rows(self, features: KeyedJaggedTensor) -> ItemRows:
        """Looks up the vectors of items and the table rows that they are computed from.

        Args:
            features: A bag for each of the X occurrences; see `ItemTables.forward`.
        """
        rows = self.item_tables.rows(features)
        if self.text_tables is None:
            return rows
        with torch.no_grad():
            return replace(rows, texts_XH=self.text_tables(features).values())

    def encode(self, features: KeyedJaggedTensor, graph: SessionGraph) -> EncodedSessions:
        """Encodes sessions without candidates.

        Args:
            features: A bag for each node; further bags are ignored.
            graph: The sessions' graphs.

        Returns:
            Node states and session vectors.
        """
        return self.encoder(self.rows(features).vectors_XD[: graph.node_items_N.shape[0]], graph)

    def queries(self, batch: SessionBatch) -> Tensor:
        """Queries of a batch, [B, Q]."""
        queries_BQ: Tensor = self(batch).queries_BQ
        return queries_BQ

    def encoder_queries(self, nodes_ND: Tensor, graph: SessionGraph) -> Tensor:
        """The encoder's columns of the queries, from vectors of the nodes, [B, D].

        Args:
            nodes_ND: Item vectors of the nodes.
            graph: The sessions' graphs.
        """
        return self.as_query(self.encoder(nodes_ND, graph).sessions_BD)

    def item_vectors(self, features: KeyedJaggedTensor) -> Tensor:
        """Item vectors, [C, Q]; scores are queries @ item_vectors.T.

        Args:
            features: A bag for each item; see `ItemTables.forward`.
        """
        return self.as_items(self.rows(features))

    def as_items(self, rows: ItemRows) -> Tensor:
        """Item vectors from table rows, [C, Q]."""
        items_CD = self._as_item(rows.vectors_XD)
        if self.text_encoder is None or rows.texts_XH is None:
            return items_CD
        return torch.cat([items_CD, rows.texts_XH], 1)

    def as_query(self, sessions_BD: Tensor) -> Tensor:
        """Queries from session vectors, [B, D]."""
        return normalize(sessions_BD) / self.temperature if self.score == "cosine" else sessions_BD

    def _as_item(self, vectors_CD: Tensor) -> Tensor:
        return normalize(vectors_CD) if self.score == "cosine" else vectors_CD


def text_encoder_of(model: nn.Module) -> TextSequenceEncoder | None:
    """The text sequence encoder of a model; None without one."""
    return model.text_encoder if isinstance(model, SessionRecommender) else None
