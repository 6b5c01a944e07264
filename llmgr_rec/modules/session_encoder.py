"""Base class of session encoders, and segment operations for them; the registry is in `encoders`.

Shapes: B sessions, N nodes (the distinct items of each session, session by session), M of them in longest prefixes, V
items of the catalog, D = d1 columns, K channels.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmgr_rec.config import EncoderConfig
from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.errors import UserError
from llmgr_rec.kernels.shared_states import rows_or_zeros


@dataclass
class EncodedSessions:
    """Output of a session encoder for a batch.

    Args:
        states_ND: State of each node.
        sessions_BD: Session vectors; zeros for a session without clicks.
    """

    states_ND: Tensor
    sessions_BD: Tensor


class SessionEncoder(nn.Module, ABC):
    """Base class of session encoders, which compute node states and session vectors from node vectors.

    The output for a session must not depend on the other sessions of the batch. The vector of a session without clicks
    is zeros. A subclass is constructed as `cls(config, dim)` from the encoder settings and the width of item, node and
    session vectors, in columns.

    Attributes:
        supports_one_pass: Whether `encode_one_pass` is implemented, which requires that no state depends on later
            clicks.
    """

    supports_one_pass: ClassVar[bool] = False

    @classmethod
    def one_pass_problem(cls, config: EncoderConfig) -> str:
        """Why an encoder of these settings has no `encode_one_pass`; empty if it has.

        Args:
            config: Encoder settings.
        """
        return "" if cls.supports_one_pass else f"encoder {config.name} does not support it"

    @classmethod
    def check(cls, config: EncoderConfig, dim: int) -> None:
        """Validates the settings before a run starts; accepts all by default.

        Args:
            config: Encoder settings.
            dim: Width of item, node and session vectors, in columns.

        Raises:
            UserError: A setting is out of its range; the message says how to fix it.
        """

    @abstractmethod
    def forward(self, nodes_ND: Tensor, graph: SessionGraph) -> EncodedSessions:
        """Encodes a batch.

        Args:
            nodes_ND: Item vectors of the nodes, in the order of `graph.node_items_N`.
            graph: The sessions' graphs.

        Returns:
            Node states [N, D] and session vectors [B, D].
        """

    def train_in(self, dtype: torch.dtype) -> None:
        """Sets the number format of the products of a training step, where the encoder has a choice.

        Args:
            dtype: float32 or bfloat16.
        """

    def can_prepare(self, num_items: int) -> bool:
        """Whether `prepare_items` and `encode_prepared` are there, and affordable.

        Args:
            num_items: Number of items V of the catalog.
        """
        return False

    def prepare_items(self, items_VD: Tensor) -> Any:
        """What the encoder computes of an item alone, for all items of the catalog, for `encode_prepared`.

        Args:
            items_VD: Item vectors, [V, D].
        """
        raise NotImplementedError(f"{type(self).__name__} computes nothing of an item alone")

    def encode_prepared(self, prepared: Any, nodes_ND: Tensor, graph: SessionGraph) -> Tensor:
        """Session vectors [B, D] of `forward` without dropout, from what was computed for all items.

        Args:
            prepared: From `prepare_items`, with the present weights.
            nodes_ND: Node vectors.
            graph: The sessions' graphs.
        """
        raise NotImplementedError(f"{type(self).__name__} computes nothing of an item alone")

    def encode_one_pass(self, nodes_MD: Tensor, graph: SessionGraph, pass_offsets_P1: Tensor) -> Tensor:
        """Encodes all prefixes of each pass by encoding only the longest of them.

        Args:
            nodes_MD: Item vectors of the nodes of the longest prefix of each pass, which has the items of all others;
                see `data.graph.nodes_of_longest`.
            graph: Graphs of the prefixes.
            pass_offsets_P1: First prefix of each pass and, last, the number of prefixes, int64; each prefix of a pass
                is one click longer than the previous one.

        Returns:
            Session vectors of the prefixes, [B, D], as `forward` gives them.

        Raises:
            ValueError: This encoder does not support it.
        """
        raise ValueError(f"{type(self).__name__} cannot encode all prefixes of a session in one pass")

    def encode_prefixes(self, nodes_ND: Tensor, graph: SessionGraph, pass_offsets_P1: Tensor) -> Tensor:
        """Session vectors of `forward` for all prefixes of passes, [B, D]; a subclass may share work between them.

        Args:
            nodes_ND: Item vectors of the nodes of all prefixes, as `forward` has them.
            graph: Graphs of the prefixes.
            pass_offsets_P1: See `encode_one_pass`.
        """
        encoded: EncodedSessions = self(nodes_ND, graph)
        return encoded.sessions_BD


def check_heads(config: EncoderConfig, dim: int) -> None:
    """Checks the number of attention blocks and heads.

    Args:
        config: Encoder settings.
        dim: Width of the states, in columns.

    Raises:
        UserError: There is no attention block, or the number of heads does not divide the width.
    """
    if config.attention_layers < 1:
        raise UserError(
            f"setting encoder.attention_layers is {config.attention_layers}, but {config.name} needs at least 1; give 1"
        )
    if config.attention_heads < 1 or dim % config.attention_heads:
        raise UserError(
            f"setting encoder.attention_heads is {config.attention_heads}; give a number that divides tables.dim {dim}"
        )


def initialize_uniform(module: nn.Module, dim: int) -> None:
    """Draws all parameters from uniform(-1/sqrt(dim), 1/sqrt(dim)), as in the code of the SR-GNN and GC-SAN authors."""
    bound = dim**-0.5
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -bound, bound)


def click_counts(graph: SessionGraph) -> Tensor:
    """Number of clicks on each node in its session, float32 [N]."""
    return occurrences(graph.alias_L, graph.node_items_N.shape[0])


def occurrences(indices: Tensor, size: int) -> Tensor:
    """Number of occurrences of each index, float32 [size], exact up to 2^24.

    Not `torch.bincount`, whose length depends on the data: the compiler would have to read it.

    Args:
        indices: Indices, 0 .. size - 1, int64.
        size: Number of counts.
    """
    ones = torch.ones(indices.shape[0], device=indices.device)
    return torch.zeros(size, device=indices.device).scatter_add_(0, indices, ones)


def last_states(states_ND: Tensor, graph: SessionGraph) -> Tensor:
    """State of each session's last click, [B, D]; zeros for sessions without clicks.

    Args:
        states_ND: Node states.
        graph: The sessions' graphs.
    """
    return rows_or_zeros(states_ND, graph.last_node_B)


def segment_sum(values_NK: Tensor, session_N: Tensor, num_sessions: int) -> Tensor:
    """Sums node values within each session.

    Args:
        values_NK: Values of the nodes.
        session_N: Session of each node.
        num_sessions: Number B of sessions.

    Returns:
        Sums, [B, K]; zeros for sessions without nodes.
    """
    return values_NK.new_zeros(num_sessions, values_NK.shape[1]).index_add(0, session_N, values_NK)


def segment_softmax(scores_NK: Tensor, session_N: Tensor, num_sessions: int) -> Tensor:
    """Softmax over the nodes of each session, separately for each channel.

    Args:
        scores_NK: Scores of the nodes.
        session_N: Session of each node.
        num_sessions: Number B of sessions.

    Returns:
        Weights that sum to 1 within each session, [N, K].
    """
    # The maximum cancels out of the result, so it needs no gradient.
    detached_NK = scores_NK.detach()
    highest_BK = detached_NK.new_full((num_sessions, scores_NK.shape[1]), float("-inf"))
    highest_BK.scatter_reduce_(0, session_N.unsqueeze(1).expand_as(detached_NK), detached_NK, "amax")
    exp_NK = (scores_NK - highest_BK.index_select(0, session_N)).exp()
    return exp_NK / segment_sum(exp_NK, session_N, num_sessions).index_select(0, session_N)
