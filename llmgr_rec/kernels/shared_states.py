"""Scores and weighted sums of the nodes of sessions, several of which may share one state.

In one pass over all prefixes of a session, most nodes have the state of a node of a shorter prefix (see
`prefix_nodes`). With the vectors v of the sessions, the weights w of the nodes and the state s of each node:

    scores[n] = v[session of n] . s[n]
    sums[b]   = sum over the nodes n of session b of w[n] * s[n]

The gradient of a state, by either, is a weighted sum of the vectors of sessions over the nodes with that state. On a
CPU all of these are torch's kernels for bags of rows, so no row of width D is held for each node.

Shapes: B sessions, N nodes, C states, A heads, D columns.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_SUM = 0


@dataclass
class SharedStates:
    """States of the nodes of a batch.

    Args:
        states_CD: The states.
        session_N: Session of each node, int64, in ascending order.
        offsets_B1: First node of each session; the last entry is N.
        state_N: State of each node; None where node n has state n.
    """

    states_CD: Tensor
    session_N: Tensor
    offsets_B1: Tensor
    state_N: Tensor | None = None

    @property
    def num_sessions(self) -> int:
        """Number of sessions B."""
        return self.offsets_B1.shape[0] - 1

    def of_nodes(self) -> Tensor:
        """State of each node, [N, D]."""
        return self.states_CD if self.state_N is None else self.states_CD.index_select(0, self.state_N)

    def at(self, node_B: Tensor) -> Tensor:
        """States of some nodes, [B, D]; zeros for the number -1.

        Args:
            node_B: Numbers of the nodes.
        """
        if self.state_N is not None:
            node_B = torch.cat([node_B.new_full((1,), -1), self.state_N]).index_select(0, node_B + 1)
        return rows_or_zeros(self.states_CD, node_B)

    def scores(self, vectors_ABD: Tensor) -> Tensor:
        """Dot product of each node's state with the vector of its session, for each head, [N, A].

        Args:
            vectors_ABD: Vectors of the sessions.
        """
        if self._has_bags(vectors_ABD):
            return torch.stack([_Scores.apply(vectors, self.states_CD, self._bags) for vectors in vectors_ABD], dim=1)
        vectors_NAD = vectors_ABD.transpose(0, 1).index_select(0, self.session_N)
        return (vectors_NAD * self.of_nodes().unsqueeze(1)).sum(dim=2)

    def sums(self, weights_NA: Tensor) -> Tensor:
        """Weighted sum of the states of the nodes of each session, for each head, [A, B, D].

        Args:
            weights_NA: Weights of the nodes.
        """
        if self._has_bags(weights_NA):
            return torch.stack([_Sums.apply(weights, self.states_CD, self._bags) for weights in weights_NA.unbind(1)])
        weighted_NAD = weights_NA.unsqueeze(2) * self.of_nodes().unsqueeze(1)
        sums = weighted_NAD.new_zeros(self.num_sessions, weighted_NAD.shape[1] * weighted_NAD.shape[2])
        sums = sums.index_add(0, self.session_N, weighted_NAD.flatten(1))
        return sums.unflatten(1, weighted_NAD.shape[1:]).transpose(0, 1)

    def _has_bags(self, factors: Tensor) -> bool:
        if torch.compiler.is_compiling() or self.states_CD.device.type != "cpu":
            return False
        return factors.dtype == self.states_CD.dtype and factors.dtype in (torch.float32, torch.float64)

    @cached_property
    def _bags(self) -> "_Bags":
        num_states = self.states_CD.shape[0]
        if self.state_N is None:
            numbers = torch.arange(num_states + 1)
            return _Bags(numbers[:-1], self.session_N, self.offsets_B1, numbers[:-1], numbers)
        order_N = torch.argsort(self.state_N, stable=True)
        counts_C = torch.bincount(self.state_N, minlength=num_states)
        return _Bags(self.state_N, self.session_N, self.offsets_B1, order_N, functional.pad(counts_C.cumsum(0), (1, 0)))


def rows_or_zeros(states_CD: Tensor, number_B: Tensor) -> Tensor:
    """Rows of a matrix, [B, D]; zeros for the number -1.

    Args:
        states_CD: The matrix.
        number_B: Numbers of rows, int64.
    """
    # Row 0 stands for -1, so that -1 + 1 picks zeros, also of a matrix without rows.
    padded = torch.cat([states_CD.new_zeros(1, states_CD.shape[1]), states_CD])
    return padded.index_select(0, number_B + 1)


@dataclass
class _Bags:
    """The nodes by session and, for gradients, by state.

    Args:
        state_N: State of each node.
        session_N: Session of each node.
        offsets_B1: First node of each session; the last entry is N.
        order_N: The nodes in order of their states.
        offsets_C1: First of them with each state; the last entry is N.
    """

    state_N: Tensor
    session_N: Tensor
    offsets_B1: Tensor
    order_N: Tensor
    offsets_C1: Tensor

    def scores(self, vectors_BD: Tensor, states_CD: Tensor) -> Tensor:
        """Dot product of each node, [N]: the gradient of the weights of a bag."""
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            vectors_BD.contiguous(), states_CD, self.state_N, self.offsets_B1[:-1], self.session_N, _SUM
        )

    def sums(self, weights_N: Tensor, states_CD: Tensor) -> Tensor:
        """Weighted sum of the states of each session, [B, D]."""
        return _sums_of_bags(self.state_N, states_CD, self.offsets_B1, weights_N)

    def sums_by_state(self, weights_N: Tensor, vectors_BD: Tensor) -> Tensor:
        """Weighted sum of the sessions' vectors over the nodes of each state, [C, D]."""
        sessions_N, weights_N = (values.index_select(0, self.order_N) for values in (self.session_N, weights_N))
        return _sums_of_bags(sessions_N, vectors_BD.contiguous(), self.offsets_C1, weights_N)


def _sums_of_bags(index_N: Tensor, rows: Tensor, offsets: Tensor, weights_N: Tensor) -> Tensor:
    return functional.embedding_bag(
        index_N, rows, offsets, mode="sum", per_sample_weights=weights_N, include_last_offset=True
    )


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors_BD: Tensor, states_CD: Tensor, bags: _Bags) -> Tensor:
        ctx.save_for_backward(vectors_BD, states_CD)
        ctx.bags = bags
        return bags.scores(vectors_BD, states_CD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_scores_N: Tensor) -> tuple[Tensor, Tensor, None]:
        vectors_BD, states_CD = ctx.saved_tensors
        return ctx.bags.sums(of_scores_N, states_CD), ctx.bags.sums_by_state(of_scores_N, vectors_BD), None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_N: Tensor, states_CD: Tensor, bags: _Bags) -> Tensor:
        ctx.save_for_backward(weights_N, states_CD)
        ctx.bags = bags
        return bags.sums(weights_N, states_CD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sums_BD: Tensor) -> tuple[Tensor, Tensor, None]:
        weights_N, states_CD = ctx.saved_tensors
        return ctx.bags.scores(of_sums_BD, states_CD), ctx.bags.sums_by_state(weights_N, of_sums_BD), None
