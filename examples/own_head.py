"""A ranking head of your own: docs/extending/head.md explains it.

    python -m llmgr_rec.train --config llm --dataset DATASET --output RUN --head.name examples.own_head:PlainHead

Shapes: B sessions, C items, D = d1 columns, H = d2 hidden width, Q columns of queries and item vectors.
"""

from torch import Tensor, nn

from llmgr_rec.config import HeadConfig
from llmgr_rec.modules.heads import RankingHead


class PlainHead(RankingHead):
    """Projects the hidden state to width d1; an item vector is the item's id row."""

    def __init__(self, config: HeadConfig, d1: int, d2: int, num_items: int) -> None:
        super().__init__(config, d1, d2, num_items)
        self.query = nn.Linear(d2, d1)

    def queries(self, hidden_BH: Tensor, recommender_queries_BD: Tensor) -> Tensor:
        """Queries [B, Q]."""
        return self.join(self.query(self.standardize(hidden_BH)), recommender_queries_BD)

    def items(self, item_rows_CD: Tensor, rows_CD: Tensor, text_CH: Tensor | None, ids_C: Tensor | None) -> Tensor:
        """Item vectors [C, Q]."""
        return self.join(rows_CD.float(), item_rows_CD)
