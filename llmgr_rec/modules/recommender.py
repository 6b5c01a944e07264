"""The session recommender: item tables, a session encoder and a score; the backbone that LLMGR builds on.

Shapes: B sessions, N nodes, C candidates, X = N + C bags, D = d1 columns, K columns of the text tower, Q columns of
queries and items (D, or D + K), H columns of a text encoding.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.modules.item_tables import ItemRows, ItemTables
from llmgr_rec.modules.item_text import ItemText
from llmgr_rec.modules.normalise import normalise
from llmgr_rec.modules.session_encoder import EncodedSessions, SessionEncoder
from llmgr_rec.modules.text_reader import TextReader
from llmgr_rec.modules.text_tower import TextTower

torch.fx.wrap("encode_prefixes")
torch.fx.wrap("normalise")


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
        candidate_texts_CH: Text encodings of the candidates, where the recommender reads any.
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
        item_text: Text encodings of the items, and what they add to item vectors; None where text is not read.
        text_tower: Second reader of sessions, whose score is added; it needs item_text.
    """

    def __init__(
        self,
        item_tables: ItemTables,
        encoder: SessionEncoder,
        score: Literal["dot", "cosine"],
        temperature: float,
        item_text: ItemText | None = None,
        text_tower: TextTower | TextReader | None = None,
    ) -> None:
        super().__init__()
        self.item_tables = item_tables
        self.encoder = encoder
        self.score = score
        self.temperature = temperature
        self.item_text = item_text
        self.text_tower = text_tower

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
        queries_BQ, candidates_CQ = self._as_query(encoded.sessions_BD), self._as_item(candidates_CD)
        if self.text_tower is not None:
            read = self.text_tower(rows.texts_XH, batch)
            queries_BQ, candidates_CQ = torch.cat([queries_BQ, read[0]], 1), torch.cat([candidates_CQ, read[1]], 1)
        return Recommended(
            queries_BQ=queries_BQ,
            candidates_CQ=candidates_CQ,
            states_ND=encoded.states_ND,
            rows_ND=rows_ND,
            sessions_BD=encoded.sessions_BD,
            candidate_ids_CD=rows.ids_XD[num_nodes:],
            candidate_texts_CH=None if rows.texts_XH is None else rows.texts_XH[num_nodes:],
        )

    def read_texts(self, batch: SessionBatch) -> tuple[Tensor, Tensor]:
        """What the text tower alone makes of a batch: queries [B, K] and candidates [C, K].

        Raises:
            ValueError: There is no text tower.
        """
        if self.item_text is None or self.text_tower is None:
            raise ValueError("the recommender was built without a text tower")
        read = self.text_tower(self.item_text(batch.features), batch)
        return read[0], read[1]

    def rows(self, features: KeyedJaggedTensor) -> ItemRows:
        """Looks up items: their vectors and what these are made of.

        Args:
            features: A bag for each of the X occurrences, under the keys of the item tables and of the item text.
        """
        rows = self.item_tables.rows(features)
        if self.item_text is None:
            return rows
        texts_XH = self.item_text(features)
        return ItemRows(self.item_text.add_to(rows.vectors_XD, texts_XH), rows.ids_XD, texts_XH)

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
        queries_BQ: Tensor = self(batch).queries_BQ
        return queries_BQ

    def item_vectors(self, features: KeyedJaggedTensor) -> Tensor:
        """Makes the items' side of the score for one bag an item, [C, Q]: scores are queries @ items.T."""
        return self.as_items(self.rows(features))

    def as_items(self, rows: ItemRows) -> Tensor:
        """Turns items that were looked up into the items' side of the score, [C, Q]."""
        items_CD = self._as_item(rows.vectors_XD)
        if self.text_tower is None or rows.texts_XH is None:
            return items_CD
        return torch.cat([items_CD, self.text_tower.items(rows.texts_XH)], 1)

    def _as_query(self, sessions_BD: Tensor) -> Tensor:
        return normalise(sessions_BD) / self.temperature if self.score == "cosine" else sessions_BD

    def _as_item(self, vectors_CD: Tensor) -> Tensor:
        return normalise(vectors_CD) if self.score == "cosine" else vectors_CD


def text_reader_of(model: nn.Module) -> TextReader | None:
    """The language model that reads sessions as text beside a recommender's encoder, where it has one."""
    tower = model.text_tower if isinstance(model, SessionRecommender) else None
    return tower if isinstance(tower, TextReader) else None
