"""Heads: the language model's hidden state of a session becomes item scores; `HEADS` has them by name.

A head gives queries and items, so that full softmax, sampled softmax and top-K are the same code: a score is the
dot product of a query and an item. A residual head appends the session recommender's own queries and items, which
adds the recommender's score to the head's.

Shapes: B sessions, C items, V items of the catalog, D = d1 columns, H = d2 hidden width, Q columns of both sides.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmgr_rec.config import HeadConfig
from llmgr_rec.registry import resolve_class

# Beside a recommender's score a head starts at a tenth of unit variance, so tuning starts from its ranking.
_RESIDUAL_START = 0.1


def _start(config: HeadConfig) -> float:
    return _RESIDUAL_START if config.residual and not config.separate_loss else 1.0


class RankingHead(nn.Module, ABC):
    """The interface of heads: a score is the dot product of a query and an item, so both have Q columns.

    A class is built as `cls(config, d1, d2, num_items)`.

    Args:
        config: Head settings, of which a class uses those that it needs.
        d1: Width of item vectors, in columns.
        d2: Width of the language model's hidden states and of the text encodings, in columns.
        num_items: Items of the catalog.
        own_columns: Columns of the head's own queries and items, before those of the recommender are appended; None
            stands for d1.

    Attributes:
        uses_text: Whether `items` is given text encodings.
    """

    uses_text: bool = False

    def __init__(self, config: HeadConfig, d1: int, d2: int, num_items: int, own_columns: int | None = None) -> None:
        super().__init__()
        self.check(config)
        self.d2 = d2
        self.residual = config.residual
        self.own_columns = d1 if own_columns is None else own_columns
        self.trained_columns = self.own_columns if config.separate_loss else None

    @classmethod
    def check(cls, config: HeadConfig) -> None:
        """Refuses settings with which the head cannot be built, before a run starts.

        Args:
            config: Head settings.

        Raises:
            UserError: Settings do not go together; the message names them and how to fix them.
        """

    @classmethod
    def reads_text(cls, config: HeadConfig) -> bool:
        """Whether a head of these settings needs text encodings of the items."""
        return False

    @abstractmethod
    def queries(self, hidden_BH: Tensor, recommender_queries_BD: Tensor) -> Tensor:
        """Makes the queries.

        Args:
            hidden_BH: The language model's hidden state of each session.
            recommender_queries_BD: The session recommender's queries; appended when residual, see `join`.

        Returns:
            Queries, [B, Q].
        """

    @abstractmethod
    def items(self, item_rows_CD: Tensor, rows_CD: Tensor, text_CH: Tensor | None, ids_C: Tensor | None) -> Tensor:
        """Makes the items' side.

        Args:
            item_rows_CD: The session recommender's item vectors; appended when residual, see `join`.
            rows_CD: Bare rows of the id table.
            text_CH: Text encodings of the items, from `standardize`; None unless `uses_text`.
            ids_C: Item indices; None stands for the whole catalog in index order.

        Returns:
            Items, [C, Q].
        """

    def standardize(self, hidden_XH: Tensor) -> Tensor:
        """Scales hidden states to unit variance: their size differs a hundredfold between language models."""
        return functional.layer_norm(hidden_XH.float(), (self.d2,))

    def recommender_only(self, recommender_queries_BD: Tensor) -> Tensor:
        """Queries that give the recommender's score alone on the same items, [B, Q].

        Raises:
            ValueError: The head does not add that score.
        """
        if not self.residual:
            raise ValueError("a head without residual does not add the recommender's score")
        own = recommender_queries_BD.new_zeros(recommender_queries_BD.shape[0], self.own_columns)
        return self.join(own, recommender_queries_BD)

    def join(self, own: Tensor, recommender: Tensor) -> Tensor:
        """The head's own columns, followed by the recommender's where the head is residual."""
        return torch.cat([own, recommender.to(own.dtype)], dim=1) if self.residual else own


class TiedHead(RankingHead):
    """Projects the hidden state to d1 and compares it with item vectors: the id row plus the item's projected text.

    It has no weight of its own for any item, so it scales with the catalog's tables and scores unseen items by text.

    Args:
        config: Head settings; item_text adds the projected text embedding to an item's vector.
        d1: Width of item vectors.
        d2: Width of the language model's hidden states and of the text encodings.
        num_items: Unused.
    """

    def __init__(self, config: HeadConfig, d1: int, d2: int, num_items: int) -> None:
        super().__init__(config, d1, d2, num_items)
        self.uses_text = self.reads_text(config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_start(config))))
        self.query = nn.Linear(d2, d1)
        self.text = nn.Linear(d2, d1, bias=False) if self.uses_text else None
        # Query components start at unit variance, both parts of an item at unit norm: scores start at unit variance.
        nn.init.normal_(self.query.weight, std=d2**-0.5)
        nn.init.zeros_(self.query.bias)
        if self.text is not None:
            nn.init.normal_(self.text.weight, std=(d1 * d2) ** -0.5)

    @classmethod
    def reads_text(cls, config: HeadConfig) -> bool:
        """See `RankingHead.reads_text`."""
        return config.item_text

    def queries(self, hidden_BH: Tensor, recommender_queries_BD: Tensor) -> Tensor:
        """Makes the queries; see `RankingHead.queries`."""
        return self.join(self.query(self.standardize(hidden_BH)) * self.log_scale.exp(), recommender_queries_BD)

    def items(self, item_rows_CD: Tensor, rows_CD: Tensor, text_CH: Tensor | None, ids_C: Tensor | None) -> Tensor:
        """Makes the items' side.

        Args:
            item_rows_CD: The session recommender's item vectors; read when residual.
            rows_CD: Bare rows of the id table.
            text_CH: Text encodings of the items, from `standardize`; read when the head was built with text.
            ids_C: Unused: this head has no weights of its own for an item.

        Returns:
            Items, [C, Q].

        Raises:
            ValueError: The head was built with text and there is none.
        """
        own_CD = functional.normalize(rows_CD.float(), dim=1)
        if self.text is not None:
            if text_CH is None:
                raise ValueError("the tied head was built with text, but no text embeddings were given")
            own_CD = own_CD + self.text(text_CH)
        return self.join(own_CD, item_rows_CD)


class LinearHead(RankingHead):
    """The paper's f_out: a free weight vector and a bias for each item.

    Args:
        config: Head settings.
        d1: Unused.
        d2: Width of the language model's hidden states.
        num_items: Items of the catalog.
    """

    def __init__(self, config: HeadConfig, d1: int, d2: int, num_items: int) -> None:
        super().__init__(config, d1, d2, num_items, own_columns=d2 + 1)
        self.weight_VH = nn.Parameter(torch.empty(num_items, d2))
        self.bias_V = nn.Parameter(torch.zeros(num_items))
        # Small weights and not a small factor: AdamW moves every weight by about the learning rate, whatever its
        # gradient's size, and a factor would shrink what that does to a score.
        nn.init.normal_(self.weight_VH, std=_start(config) * d2**-0.5)

    def queries(self, hidden_BH: Tensor, recommender_queries_BD: Tensor) -> Tensor:
        """Makes the queries; see `TiedHead.queries`. The last own column is the bias's factor."""
        own_BH = self.standardize(hidden_BH)
        own = torch.cat([own_BH, own_BH.new_ones(own_BH.shape[0], 1)], dim=1)
        return self.join(own, recommender_queries_BD)

    def items(self, item_rows_CD: Tensor, rows_CD: Tensor, text_CH: Tensor | None, ids_C: Tensor | None) -> Tensor:
        """Makes the items' side.

        Args:
            item_rows_CD: The session recommender's item vectors; read when residual.
            rows_CD: Unused: this head's weights are its own.
            text_CH: Unused.
            ids_C: Item indices whose weights to take; None takes the whole catalog in index order.

        Returns:
            Items, [C, Q].
        """
        weight_CH = self.weight_VH if ids_C is None else self.weight_VH.index_select(0, ids_C)
        bias_C = self.bias_V if ids_C is None else self.bias_V.index_select(0, ids_C)
        return self.join(torch.cat([weight_CH, bias_C.unsqueeze(1)], dim=1), item_rows_CD)


HEADS: dict[str, type[RankingHead]] = {"tied": TiedHead, "linear": LinearHead}


def head_class(name: str) -> type[RankingHead]:
    """The class that `head.name` stands for.

    Args:
        name: Key of `HEADS`, or the import path of a subclass of `RankingHead`, whose module is imported.

    Raises:
        UserError: There is no such class.
    """
    return resolve_class(name, HEADS, "setting head.name", RankingHead)  # type: ignore[type-abstract]


def build_head(config: HeadConfig, d1: int, d2: int, num_items: int) -> RankingHead:
    """Builds the head that the settings name; see `RankingHead` for the arguments.

    Raises:
        UserError: There is no such head, or it cannot be built with these settings.
    """
    return head_class(config.name)(config, d1, d2, num_items)
