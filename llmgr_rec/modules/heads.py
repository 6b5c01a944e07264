"""Heads: the language model's reading of a session becomes item scores.

Both heads give queries and items, so that full softmax, sampled softmax and top-K are the same code: a score is the
dot product of a query and an item. A residual head appends the session recommender's own queries and items, which
adds the recommender's score to the head's.

Shapes: B sessions, C items, V items of the catalogue, D = d1 columns, H = d2 hidden width, Q columns of both sides.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

# Beside a recommender's score a head starts at a tenth of unit variance, so tuning starts from its ranking.
_RESIDUAL_START = 0.1


def _start(residual: bool, apart: bool) -> float:
    return _RESIDUAL_START if residual and not apart else 1.0


class _Head(nn.Module):
    def __init__(self, d2: int, residual: bool, own_columns: int, apart: bool) -> None:
        super().__init__()
        self.d2 = d2
        self.residual = residual
        self.own_columns = own_columns
        self.trained_columns = own_columns if apart else None

    def standardise(self, hidden_XH: Tensor) -> Tensor:
        """Brings hidden states to unit variance: their size differs a hundredfold between language models."""
        return functional.layer_norm(hidden_XH.float(), (self.d2,))

    def without_reading(self, recommender_queries_BD: Tensor) -> Tensor:
        """Queries that give the recommender's score alone on the same items, [B, Q].

        Raises:
            ValueError: The head does not add that score.
        """
        if not self.residual:
            raise ValueError("a head that is not residual knows nothing of the recommender's score")
        own = recommender_queries_BD.new_zeros(recommender_queries_BD.shape[0], self.own_columns)
        return self._join(own, recommender_queries_BD)

    def _join(self, own: Tensor, recommender: Tensor) -> Tensor:
        return torch.cat([own, recommender.to(own.dtype)], dim=1) if self.residual else own


class TiedHead(_Head):
    """Projects the reading to d1 and compares it with item vectors: the id row plus the item's projected text.

    It has no weight of its own for any item, so it scales with the catalogue's tables and scores unseen items by text.

    Args:
        d1: Width of item vectors.
        d2: Width of the language model's hidden states and of the text encodings.
        text: Add the projected text encoding to an item's vector.
        residual: Add the session recommender's score.
        text_only: An item's vector is its text alone, without its id row.
        apart: Only the head's own score is trained.

    Raises:
        ValueError: Text alone shall tell items, and there is none.
    """

    def __init__(
        self, d1: int, d2: int, text: bool, residual: bool, text_only: bool = False, apart: bool = False
    ) -> None:
        super().__init__(d2, residual, d1, apart)
        if text_only and not text:
            raise ValueError("a head without text cannot tell items by text only")
        self.text_only = text_only
        self.log_scale = nn.Parameter(torch.tensor(math.log(_start(residual, apart))))
        self.query = nn.Linear(d2, d1)
        self.text = nn.Linear(d2, d1, bias=False) if text else None
        # Query components start at unit variance, both parts of an item at unit norm: scores start at unit variance.
        nn.init.normal_(self.query.weight, std=d2**-0.5)
        nn.init.zeros_(self.query.bias)
        if self.text is not None:
            nn.init.normal_(self.text.weight, std=(d1 * d2) ** -0.5)

    def queries(self, hidden_BH: Tensor, recommender_queries_BD: Tensor) -> Tensor:
        """Makes the queries.

        Args:
            hidden_BH: The language model's reading of each session.
            recommender_queries_BD: The session recommender's queries; read when residual.

        Returns:
            Queries, [B, Q].
        """
        return self._join(self.query(self.standardise(hidden_BH)) * self.log_scale.exp(), recommender_queries_BD)

    def items(self, item_rows_CD: Tensor, rows_CD: Tensor, text_CH: Tensor | None, ids_C: Tensor | None) -> Tensor:
        """Makes the items' side.

        Args:
            item_rows_CD: The session recommender's item vectors; read when residual.
            rows_CD: Bare rows of the id table.
            text_CH: Text encodings of the items, from `standardise`; read when the head was built with text.
            ids_C: Unused: this head has no weights of its own for an item.

        Returns:
            Items, [C, Q].

        Raises:
            ValueError: The head was built with text and there is none.
        """
        parts_CD = [] if self.text_only else [functional.normalize(rows_CD.float(), dim=1)]
        if self.text is not None:
            if text_CH is None:
                raise ValueError("the tied head was built with text, but no text encodings were given")
            parts_CD.append(self.text(text_CH))
        return self._join(sum(parts_CD[1:], start=parts_CD[0]), item_rows_CD)


class LinearHead(_Head):
    """The paper's f_out: a free weight vector and a bias for each item.

    Args:
        d2: Width of the language model's hidden states.
        num_items: Items of the catalogue.
        residual: Add the session recommender's score.
        apart: Only the head's own score is trained.
    """

    def __init__(self, d2: int, num_items: int, residual: bool, apart: bool = False) -> None:
        super().__init__(d2, residual, d2 + 1, apart)
        self.weight_VH = nn.Parameter(torch.empty(num_items, d2))
        self.bias_V = nn.Parameter(torch.zeros(num_items))
        # Small weights and not a small factor: AdamW moves every weight by about the learning rate, whatever its
        # gradient's size, and a factor would shrink what that does to a score.
        nn.init.normal_(self.weight_VH, std=_start(residual, apart) * d2**-0.5)

    def queries(self, hidden_BH: Tensor, recommender_queries_BD: Tensor) -> Tensor:
        """Makes the queries; see `TiedHead.queries`. The last own column is the bias's factor."""
        own_BH = self.standardise(hidden_BH)
        own = torch.cat([own_BH, own_BH.new_ones(own_BH.shape[0], 1)], dim=1)
        return self._join(own, recommender_queries_BD)

    def items(self, item_rows_CD: Tensor, rows_CD: Tensor, text_CH: Tensor | None, ids_C: Tensor | None) -> Tensor:
        """Makes the items' side.

        Args:
            item_rows_CD: The session recommender's item vectors; read when residual.
            rows_CD: Unused: this head's weights are its own.
            text_CH: Unused.
            ids_C: Item indices whose weights to take; None takes the whole catalogue in index order.

        Returns:
            Items, [C, Q].
        """
        weight_CH = self.weight_VH if ids_C is None else self.weight_VH.index_select(0, ids_C)
        bias_C = self.bias_V if ids_C is None else self.bias_V.index_select(0, ids_C)
        return self._join(torch.cat([weight_CH, bias_C.unsqueeze(1)], dim=1), item_rows_CD)
