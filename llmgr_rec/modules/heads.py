"""Ranking heads: scores of items from the language model's hidden state of a session; `HEADS` is their registry.

A score is the dot product of a query and an item vector, so full softmax, sampled softmax and top-K share their code.
A residual head appends the session recommender's queries and item vectors to its own, which adds the two scores.

Shapes: B sessions, C items, V items of the catalog, D = d1 columns, H = d2 hidden width, Q columns of queries and item
vectors.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmgr_rec.config import HeadConfig
from llmgr_rec.registry import construct, resolve_class

# Initial scale of the head's score where the recommender's is added: small, so that training starts from its ranking.
_RESIDUAL_SCALE = 0.1


def _initial_scale(config: HeadConfig) -> float:
    return _RESIDUAL_SCALE if config.residual and not config.separate_loss else 1.0


class RankingHead(nn.Module, ABC):
    """Base class of heads: a score is the dot product of a query and an item vector, both of Q columns.

    A subclass is constructed as `cls(config, d1, d2, num_items)`.

    Args:
        config: Head settings; a subclass uses those that it needs.
        d1: Width of item vectors, in columns.
        d2: Width of the language model's hidden states and of the text embeddings, in columns.
        num_items: Items of the catalog.
        head_columns: Columns of the head's queries and item vectors, without those appended from the recommender; None
            takes d1.

    Attributes:
        uses_text: Whether `items` requires text embeddings.
        separate_loss: Whether the training loss uses the head's own columns only, see `trained_columns_only`.
        item_parameters: Names of parameters that have a row for each item, which follow the items into another catalog.

    Raises:
        UserError: A setting is out of its range.
    """

    uses_text: bool = False
    item_parameters: tuple[str, ...] = ()

    def __init__(self, config: HeadConfig, d1: int, d2: int, num_items: int, head_columns: int | None = None) -> None:
        super().__init__()
        self.check(config)
        self.d2 = d2
        self.residual = config.residual
        self.head_columns = d1 if head_columns is None else head_columns
        self.separate_loss = config.separate_loss
        self._joins = self.residual

    @classmethod
    def check(cls, config: HeadConfig) -> None:
        """Validates the settings before a run starts; accepts all by default.

        Args:
            config: Head settings.

        Raises:
            UserError: A setting is out of its range, or two settings conflict; the message says how to fix it.
        """

    @classmethod
    def needs_text(cls, config: HeadConfig) -> bool:
        """Whether a head of these settings needs text embeddings of the items."""
        return False

    @abstractmethod
    def queries(self, hidden_BH: Tensor, recommender_queries_BD: Tensor) -> Tensor:
        """Computes the queries.

        Args:
            hidden_BH: The language model's hidden state of each session.
            recommender_queries_BD: The session recommender's queries; appended when residual, see `join`.

        Returns:
            Queries, [B, Q].
        """

    @abstractmethod
    def items(self, item_rows_CD: Tensor, rows_CD: Tensor, text_CH: Tensor | None, ids_C: Tensor | None) -> Tensor:
        """Computes the item vectors.

        Args:
            item_rows_CD: The session recommender's item vectors; appended when residual, see `join`.
            rows_CD: Rows of the id table, without side features.
            text_CH: Text embeddings of the items, from `standardize`, in the dtype of the products with them; None
                unless `uses_text`.
            ids_C: Item indices, int64; None is the whole catalog in index order.

        Returns:
            Item vectors, [C, Q].
        """

    def standardize(self, hidden_XH: Tensor) -> Tensor:
        """Hidden states with unit variance, float32 [X, H]; the scales of language models differ a hundredfold."""
        return functional.layer_norm(hidden_XH.float(), (self.d2,))

    def recommender_only(self, recommender_queries_BD: Tensor) -> Tensor:
        """Queries that give only the recommender's score on the same item vectors, [B, Q].

        Args:
            recommender_queries_BD: The session recommender's queries.

        Raises:
            ValueError: The head is not residual.
        """
        if not self.residual:
            raise ValueError("a head without residual does not add the recommender's score")
        zeros = recommender_queries_BD.new_zeros(recommender_queries_BD.shape[0], self.head_columns)
        return self.join(zeros, recommender_queries_BD)

    def join(self, head: Tensor, recommender: Tensor) -> Tensor:
        """Concatenates the head's columns and, if the head is residual, the recommender's.

        Args:
            head: Queries or item vectors of the head.
            recommender: Those of the session recommender.
        """
        return torch.cat([head, recommender.to(head.dtype)], dim=1) if self._joins else head

    @contextmanager
    def trained_columns_only(self) -> Iterator[None]:
        """Within it, `join` leaves out the recommender's columns if the training loss does not use them."""
        self._joins = self.residual and not self.separate_loss
        try:
            yield
        finally:
            self._joins = self.residual


class TiedHead(RankingHead):
    """Projects the hidden state to width d1; an item vector is the item's id row plus its projected text embedding.

    The item weights are tied to the item table. So the head has no parameters per item, and it scores items without
    training clicks by their text.

    Args:
        config: Head settings; item_text adds the projected text embedding to the item vectors.
        d1: Width of item vectors, in columns.
        d2: Width of the language model's hidden states and of the text embeddings, in columns.
        num_items: Unused.
    """

    def __init__(self, config: HeadConfig, d1: int, d2: int, num_items: int) -> None:
        super().__init__(config, d1, d2, num_items)
        self.uses_text = self.needs_text(config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_initial_scale(config))))
        self.query = nn.Linear(d2, d1)
        self.text = nn.Linear(d2, d1, bias=False) if self.uses_text else None
        # Query components have unit variance and both parts of an item vector unit norm, so scores have unit variance.
        nn.init.normal_(self.query.weight, std=d2**-0.5)
        nn.init.zeros_(self.query.bias)
        if self.text is not None:
            nn.init.normal_(self.text.weight, std=(d1 * d2) ** -0.5)

    @classmethod
    def needs_text(cls, config: HeadConfig) -> bool:
        """See `RankingHead.needs_text`."""
        return config.item_text

    def queries(self, hidden_BH: Tensor, recommender_queries_BD: Tensor) -> Tensor:
        """Computes the queries; see `RankingHead.queries`."""
        return self.join(self.query(self.standardize(hidden_BH)) * self.log_scale.exp(), recommender_queries_BD)

    def items(self, item_rows_CD: Tensor, rows_CD: Tensor, text_CH: Tensor | None, ids_C: Tensor | None) -> Tensor:
        """Computes the item vectors; see `RankingHead.items`.

        Raises:
            ValueError: The head uses text, and `text_CH` is None.
        """
        vectors_CD = functional.normalize(rows_CD.float(), dim=1)
        if self.text is not None:
            if text_CH is None:
                raise ValueError("the tied head was built with text, but no text embeddings were given")
            vectors_CD = vectors_CD + functional.linear(text_CH, self.text.weight.to(text_CH.dtype))
        return self.join(vectors_CD, item_rows_CD)


class LinearHead(RankingHead):
    """The output layer f_out of LLMGR (arXiv 2402.16539): a weight vector and a bias for each item.

    Args:
        config: Head settings.
        d1: Unused.
        d2: Width of the language model's hidden states, in columns.
        num_items: Items of the catalog.
    """

    item_parameters = ("weight_VH", "bias_V")

    def __init__(self, config: HeadConfig, d1: int, d2: int, num_items: int) -> None:
        super().__init__(config, d1, d2, num_items, head_columns=d2 + 1)
        self.weight_VH = nn.Parameter(torch.empty(num_items, d2))
        self.bias_V = nn.Parameter(torch.zeros(num_items))
        # Small initial weights, instead of a small factor on the scores: an AdamW step changes a weight by about the
        # learning rate, and a factor would scale down the effect of every step.
        nn.init.normal_(self.weight_VH, std=_initial_scale(config) * d2**-0.5)

    def queries(self, hidden_BH: Tensor, recommender_queries_BD: Tensor) -> Tensor:
        """Computes the queries; see `RankingHead.queries`. A column of ones multiplies the bias."""
        states_BH = self.standardize(hidden_BH)
        queries = torch.cat([states_BH, states_BH.new_ones(states_BH.shape[0], 1)], dim=1)
        return self.join(queries, recommender_queries_BD)

    def items(self, item_rows_CD: Tensor, rows_CD: Tensor, text_CH: Tensor | None, ids_C: Tensor | None) -> Tensor:
        """The weights and biases of the items; see `RankingHead.items`."""
        weight_CH = self.weight_VH if ids_C is None else self.weight_VH.index_select(0, ids_C)
        bias_C = self.bias_V if ids_C is None else self.bias_V.index_select(0, ids_C)
        return self.join(torch.cat([weight_CH, bias_C.unsqueeze(1)], dim=1), item_rows_CD)


_SETTING = "setting head.name"

HEADS: dict[str, type[RankingHead]] = {"tied": TiedHead, "linear": LinearHead}


def head_class(name: str) -> type[RankingHead]:
    """The head class that `head.name` selects.

    Args:
        name: Key of `HEADS`, or the import path of a subclass of `RankingHead`, whose module is imported.

    Raises:
        UserError: The name is unknown, its import fails, or it is not a ranking head with the arguments of one.
    """
    arguments = ("config", "d1", "d2", "num_items")
    return resolve_class(name, HEADS, _SETTING, RankingHead, arguments)  # type: ignore[type-abstract]


def build_head(config: HeadConfig, d1: int, d2: int, num_items: int) -> RankingHead:
    """Builds the head that the settings select; see `RankingHead` for the arguments.

    Raises:
        UserError: The head is unknown, or a setting is out of its range.
    """
    return construct(head_class(config.name), config.name, _SETTING, config, d1, d2, num_items)
