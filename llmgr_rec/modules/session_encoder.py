"""The interface of session encoders, their registry and the segment operations that they share.

Shapes: B sessions, N nodes (distinct items of a session, sessions one after another), D = d1 columns, K channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from llmgr_rec.config import EncoderConfig
from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.errors import UserError


@dataclass
class EncodedSessions:
    """What an encoder reads from a batch of session graphs.

    Args:
        states_ND: A state for each node.
        sessions_BD: One vector for each session; zeros for a session without clicks.
    """

    states_ND: Tensor
    sessions_BD: Tensor


class SessionEncoder(nn.Module, ABC):
    """Reads session graphs: node vectors in, node states and session vectors out.

    A session's result depends on that session alone, whatever else stands in the batch.

    Attributes:
        supports_one_pass: Whether `encode_one_pass` is implemented: no state may depend on later clicks.
    """

    supports_one_pass: ClassVar[bool] = False

    @abstractmethod
    def forward(self, nodes_ND: Tensor, graph: SessionGraph) -> EncodedSessions:
        """Encodes a batch.

        Args:
            nodes_ND: Item vectors of the nodes, in the order of `graph.node_items_N`.
            graph: The sessions' graphs.

        Returns:
            Node states and session vectors.
        """

    def encode_one_pass(self, nodes_ND: Tensor, graph: SessionGraph, pass_offsets_P1: Tensor) -> EncodedSessions:
        """Encodes the prefixes of each pass from the longest of them alone.

        Args:
            nodes_ND: Item vectors of the nodes; those of an item are the same in all prefixes.
            graph: Graphs of the prefixes.
            pass_offsets_P1: First prefix of each pass, and last their number, int64; each prefix of a pass is one click
                longer than the one before.

        Returns:
            What `forward` gives for the same prefixes.

        Raises:
            ValueError: This encoder reads sessions only as a whole.
        """
        raise ValueError(f"{type(self).__name__} reads sessions only as a whole, not their prefixes in one pass")


_classes: dict[str, type[SessionEncoder]] = {}
EncoderClass = TypeVar("EncoderClass", bound=type[SessionEncoder])


def register_encoder(name: str) -> Callable[[EncoderClass], EncoderClass]:
    """Makes an encoder class known to `build_encoder`.

    Args:
        name: Value of `EncoderConfig.name` that stands for it.

    Returns:
        A decorator for the class, which is built as `cls(config, dim)`.
    """

    def register(cls: EncoderClass) -> EncoderClass:
        _classes[name] = cls
        return cls

    return register


def build_encoder(config: EncoderConfig, dim: int) -> SessionEncoder:
    """Builds the encoder that the settings name.

    Args:
        config: Encoder settings.
        dim: Width of item, node and session vectors, in columns.

    Returns:
        A freshly initialised encoder.

    Raises:
        KeyError: No encoder is registered under `config.name`.
    """
    classes = _registered()
    if config.name not in classes:
        raise KeyError(f"no session encoder is registered as {config.name!r}; known: {sorted(classes)}")
    return classes[config.name](config, dim)


def prefix_encoders() -> list[str]:
    """Names of the encoders that read all prefixes of a session in one pass."""
    return sorted(name for name, encoder in _registered().items() if encoder.supports_one_pass)


def _registered() -> dict[str, type[SessionEncoder]]:
    # Imported here because these modules import this one for the interface; importing them registers them.
    from llmgr_rec.modules import gcsan, gru4rec, sasrec, srgnn, stamp  # noqa: F401

    return _classes


def check_heads(config: EncoderConfig, dim: int) -> None:
    """Refuses attention that cannot be built.

    Raises:
        UserError: There is no attention block, or the number of heads does not divide the width.
    """
    if config.attention_layers < 1:
        raise UserError(
            f"encoder.attention_layers is {config.attention_layers}: {config.name} needs at least 1; set it to 1"
        )
    if config.attention_heads < 1 or dim % config.attention_heads:
        raise UserError(
            f"encoder.attention_heads is {config.attention_heads}, which does not divide tables.dim {dim}; "
            "choose a divisor of tables.dim"
        )


def initialise_uniform(module: nn.Module, dim: int) -> None:
    """Draws every parameter from uniform(-1/sqrt(dim), 1/sqrt(dim)), as the SR-GNN and GC-SAN authors do."""
    bound = dim**-0.5
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -bound, bound)


def click_counts(graph: SessionGraph) -> Tensor:
    """Counts how often each node was clicked in its session, int64 [N]."""
    return torch.bincount(graph.alias_L, minlength=graph.node_items_N.shape[0])


def last_states(states_ND: Tensor, graph: SessionGraph) -> Tensor:
    """Picks the state of each session's last click.

    Args:
        states_ND: Node states.
        graph: The sessions' graphs.

    Returns:
        States of the last clicks, zeros for sessions without clicks, [B, D].
    """
    if states_ND.shape[0] == 0:
        # Adding the empty sum keeps every parameter in the autograd graph, which static-graph DDP relies on.
        return states_ND.new_zeros(graph.num_sessions, states_ND.shape[1]) + states_ND.sum()
    filled_B1 = (graph.click_offsets_B1.diff() > 0).unsqueeze(1)
    return states_ND.index_select(0, graph.last_node_B.clamp(min=0)) * filled_B1


def segment_sum(values_NK: Tensor, session_N: Tensor, num_sessions: int) -> Tensor:
    """Sums node values within each session.

    Args:
        values_NK: Values of the nodes.
        session_N: Session of each node.
        num_sessions: Sessions B; those without nodes get zeros.

    Returns:
        Sums, [B, K].
    """
    return values_NK.new_zeros(num_sessions, values_NK.shape[1]).index_add(0, session_N, values_NK)


def segment_softmax(scores_NK: Tensor, session_N: Tensor, num_sessions: int) -> Tensor:
    """Softmax over the nodes of each session, for each channel by itself.

    Args:
        scores_NK: Scores of the nodes.
        session_N: Session of each node.
        num_sessions: Sessions B.

    Returns:
        Weights that sum to 1 within each session that has nodes, [N, K].
    """
    # The maximum cancels out of the result, so it needs no gradient.
    detached_NK = scores_NK.detach()
    highest_BK = detached_NK.new_full((num_sessions, scores_NK.shape[1]), float("-inf"))
    highest_BK.scatter_reduce_(0, session_N.unsqueeze(1).expand_as(detached_NK), detached_NK, "amax")
    exp_NK = (scores_NK - highest_BK.index_select(0, session_N)).exp()
    return exp_NK / segment_sum(exp_NK, session_N, num_sessions).index_select(0, session_N)
