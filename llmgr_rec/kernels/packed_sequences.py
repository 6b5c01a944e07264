"""The clicks of many sessions end to end, without padding, for encoders that process a session as a sequence.

Per-click layers (linear, norm, feed-forward) run on the packed clicks [L, F]. What mixes the clicks of a session
(attention, recurrence) needs one row a session; there, sessions of similar length share a bucket [R, T, F], whose rows
are padded at the end to the longest. A bucket's longest session is less than twice its shortest, so less than half of a
bucket is padding, and causal layers never look at it.

Prefixes of one session can be encoded in one pass: with causal layers, the state at click j of the longest prefix is
the state at click j of each prefix that has it. So only the longest prefix of each pass is packed, and the others find
their clicks in it.

The sessions 7 and 5 8 5, the latter with all its prefixes in one pass, are four sequences in two passes. A node is a
distinct item of a sequence:

    batch     sequence    0    1    2        3
              click       7    5    5  8    5  8  5
              node        0    1    2  3    4  5  4
    passes    0 holds sequence 0, 1 holds sequences 1 to 3:  pass_offsets_P1 = 0 1 4
    packed    position in session   0    0  1  2      the shortest session first
              node                  0    4  5  4      of the longest sequence of each pass

>>> from llmgr_rec.data.graph import build_graphs
>>> offsets_B1 = torch.tensor([0, 1, 2, 4, 7])
>>> graph = build_graphs(torch.tensor([7, 5, 5, 8, 5, 8, 5]), offsets_B1, num_items=9)
>>> packed = pack_sequences(graph, max_clicks=50, pass_offsets_P1=torch.tensor([0, 1, 4]))
>>> packed.node_L.tolist(), packed.position_L.tolist()
([0, 4, 5, 4], [0, 0, 1, 2])

Sequence 2 (5 8) ends at packed click 2, the 8 of the longest; its node 2 (the 5) is read at packed click 1:

>>> packed.last_click_B.tolist(), packed.last_click_N.tolist()
([0, 1, 2, 3], [0, 1, 1, 2, 3, 2])
>>> [(bucket.num_rows, bucket.width) for bucket in packed.buckets]
[(1, 1), (1, 3)]

Shapes: B sequences of the batch, C their clicks, N nodes, P passes, L packed clicks, R rows of T columns in a bucket, D
and F columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.data.jagged import lengths_to_offsets, ranges


@dataclass
class LengthBucket:
    """Sessions of similar length, one row each, oldest click first and padding at the end.

    Args:
        slot_L: Index of each of the bucket's clicks in its flattened rows: row * T + column.
        num_rows: Number R of sessions.
        width: Columns T of a row, the clicks of the longest session.
    """

    slot_L: Tensor
    num_rows: int
    width: int

    def pad(self, values_LF: Tensor) -> Tensor:
        """Packed values as rows [R, T, F], zeros at the padding."""
        rows = values_LF.new_zeros(self.num_rows * self.width, values_LF.shape[1])
        return rows.index_copy(0, self.slot_L, values_LF).unflatten(0, (self.num_rows, self.width))

    def unpad(self, values_RTF: Tensor) -> Tensor:
        """Rows as packed values, [L, F]."""
        return values_RTF.flatten(0, 1).index_select(0, self.slot_L)


@dataclass
class PackedSequences:
    """The newest clicks of each session, oldest first; short sessions come before long ones.

    Args:
        node_L: Node of each packed click.
        position_L: Position in its session, 0 for the first packed click of the session.
        last_click_B: Packed click at which each sequence ends, -1 for a sequence without clicks.
        last_click_N: Last packed click of each node in its sequence, -1 where all of them are too old to be packed.
        buckets: The sessions with clicks, by length; at least one bucket.
    """

    node_L: Tensor
    position_L: Tensor
    last_click_B: Tensor
    last_click_N: Tensor
    buckets: list[LengthBucket]

    def map_padded(self, function: Callable[[Tensor], Tensor], values_LF: Tensor) -> Tensor:
        """Applies a function of padded rows, [R, T, F] to [R, T, F'], to packed values, [L, F] to [L, F']."""
        parts = values_LF.split([bucket.slot_L.numel() for bucket in self.buckets])
        return torch.cat(
            [bucket.unpad(function(bucket.pad(part))) for bucket, part in zip(self.buckets, parts, strict=True)]
        )

    def session_states(self, states_LD: Tensor) -> Tensor:
        """Picks the state at the last click of each sequence, [B, D]; zeros for a sequence without clicks."""
        return _with_no_click(states_LD).index_select(0, self.last_click_B + 1)

    def node_states(self, states_LD: Tensor, nodes_ND: Tensor) -> Tensor:
        """Picks the state at the last click of each node, [N, D].

        Args:
            states_LD: A state for each packed click.
            nodes_ND: Vectors of the nodes, kept by nodes whose clicks are all too old to be packed.
        """
        states_ND = _with_no_click(states_LD).index_select(0, self.last_click_N + 1)
        return torch.where(self.last_click_N.unsqueeze(1) >= 0, states_ND, nodes_ND)


def _with_no_click(states_LD: Tensor) -> Tensor:
    """States after a row of zeros for "no click", so that -1 + 1 picks it, also in a batch without any click."""
    return torch.cat([states_LD.new_zeros(1, states_LD.shape[1]), states_LD])


def pack_sequences(graph: SessionGraph, max_clicks: int, pass_offsets_P1: Tensor | None = None) -> PackedSequences:
    """Packs the newest clicks of each session.

    Args:
        graph: The sequences' graphs.
        max_clicks: Newest clicks that are packed of each session.
        pass_offsets_P1: First sequence of each pass, and last their number, int64: the sequences of a pass are prefixes
            of one session, each one click longer than the one before, of which only the longest is packed. None packs
            every sequence.
    """
    offsets_B1 = graph.click_offsets_B1
    if pass_offsets_P1 is None:
        pass_offsets_P1 = torch.arange(graph.num_sessions + 1, device=offsets_B1.device)
    longest_P = pass_offsets_P1[1:] - 1
    lengths_P = offsets_B1.diff()[longest_P].clamp(max=max_clicks)
    first_click_P = offsets_B1[pass_offsets_P1[1:]] - lengths_P
    if torch.compiler.is_compiling():
        return _padded_sequences(graph, max_clicks, pass_offsets_P1, first_click_P)
    sorted_lengths_P, order_P = torch.sort(lengths_P, stable=True)
    packed_offsets_P1 = lengths_to_offsets(sorted_lengths_P)
    packed_start_P = torch.empty_like(lengths_P).index_copy_(0, order_P, packed_offsets_P1[:-1])
    packed_click_C = _packed_click_of_each(graph, pass_offsets_P1, first_click_P, packed_start_P)
    return PackedSequences(
        node_L=graph.alias_L.index_select(0, ranges(first_click_P[order_P], packed_offsets_P1)),
        position_L=ranges(torch.zeros_like(sorted_lengths_P), packed_offsets_P1),
        last_click_B=_last_clicks(packed_click_C, offsets_B1),
        last_click_N=_last_clicks_of_nodes(graph, packed_click_C),
        buckets=_buckets(sorted_lengths_P),
    )


def _padded_sequences(
    graph: SessionGraph, max_clicks: int, pass_offsets_P1: Tensor, first_click_P: Tensor
) -> PackedSequences:
    """The same clicks for a compiler, which cannot read the lengths: one bucket whose padding counts as clicks.

    Its width is the largest that a session of the batch can have. The node of padding is N, see `pad_node`.
    """
    num_passes, num_clicks = first_click_P.shape[0], graph.alias_L.shape[0]
    # One column or more, also without clicks.
    width = torch.sym_min(max_clicks, num_clicks + 1)
    column_T = torch.arange(width, device=graph.alias_L.device)
    click_PT = first_click_P.unsqueeze(1) + column_T
    is_click_PT = click_PT < graph.click_offsets_B1[pass_offsets_P1[1:]].unsqueeze(1)
    alias = torch.cat([graph.alias_L, graph.alias_L.new_full((1,), graph.node_items_N.shape[0])])
    packed_start_P = torch.arange(num_passes, device=alias.device) * width
    packed_click_C = _packed_click_of_each(graph, pass_offsets_P1, first_click_P, packed_start_P)
    return PackedSequences(
        node_L=alias.index_select(0, torch.where(is_click_PT, click_PT, num_clicks).flatten()),
        position_L=column_T.repeat(num_passes),
        last_click_B=_last_clicks(packed_click_C, graph.click_offsets_B1),
        last_click_N=_last_clicks_of_nodes(graph, packed_click_C),
        buckets=[LengthBucket(torch.arange(num_passes * width, device=alias.device), num_passes, width)],
    )


def pad_node(nodes_ND: Tensor) -> Tensor:
    """Node vectors as `PackedSequences.node_L` needs them: while compiling with a last row, the padding."""
    return functional.pad(nodes_ND, (0, 0, 0, 1)) if torch.compiler.is_compiling() else nodes_ND


def _last_clicks_of_nodes(graph: SessionGraph, packed_click_C: Tensor) -> Tensor:
    """Last packed click of each node, -1 where all of them are too old, [N]."""
    # Clicks are numbered in order of time, so the largest number of a node is its last click.
    return torch.full_like(graph.node_items_N, -1).scatter_reduce(0, graph.alias_L, packed_click_C, "amax")


def _packed_click_of_each(
    graph: SessionGraph, pass_offsets_P1: Tensor, first_click_P: Tensor, packed_start_P: Tensor
) -> Tensor:
    """Packed click that has the state of each click of the batch, -1 where it is too old, [C].

    Click j of a sequence is click j of the longest one of its pass p. That one's first packed click, number
    first_click[p] of the batch, is packed at packed_start[p]. So the packed click of the batch's click c is
    c + (start of the longest sequence - start of its own) + (packed_start[p] - first_click[p]).
    """
    offsets_B1, session_C = graph.click_offsets_B1, graph.click_session_L
    pass_B = torch.repeat_interleave(pass_offsets_P1.diff(), output_size=graph.num_sessions)
    start_of_longest_P = offsets_B1[pass_offsets_P1[1:] - 1]
    shift_B = start_of_longest_P[pass_B] - offsets_B1[:-1] + (packed_start_P - first_click_P)[pass_B]
    packed_click_C = torch.arange(session_C.numel(), device=session_C.device) + shift_B[session_C]
    return torch.where(packed_click_C >= packed_start_P[pass_B][session_C], packed_click_C, -1)


def _last_clicks(packed_click_C: Tensor, offsets_B1: Tensor) -> Tensor:
    """Packed click at which each sequence ends, -1 for one without clicks, [B]."""
    padded_C1 = torch.cat([packed_click_C, packed_click_C.new_full((1,), -1)])
    return padded_C1[torch.where(offsets_B1.diff() > 0, offsets_B1[1:] - 1, packed_click_C.numel())]


def _buckets(sorted_lengths_P: Tensor) -> list[LengthBucket]:
    """Buckets of sessions with ascending lengths: one for each power of two, so that no row is mostly padding."""
    filled = sorted_lengths_P[sorted_lengths_P > 0]
    if not filled.numel():
        # A row of padding, so that all parameters still take part in the backward pass.
        return [LengthBucket(torch.empty_like(filled), 1, 1)]
    buckets = []
    for lengths in filled.split(torch.bincount(torch.log2(filled.double()).long()).tolist()):
        if lengths.numel():
            width = int(lengths[-1])
            starts = torch.arange(lengths.numel(), device=lengths.device) * width
            buckets.append(LengthBucket(ranges(starts, lengths_to_offsets(lengths)), lengths.numel(), width))
    return buckets
