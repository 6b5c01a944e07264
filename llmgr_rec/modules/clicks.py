"""Clicks of sessions for encoders that read a session as a sequence: end to end without padding, or set out in rows.

Shapes: B sessions, C clicks, N nodes, G groups of sessions that are read in one pass, L clicks that are read, R rows of
T places, D and F columns.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.data.jagged import lengths_to_offsets, ranges
from llmgr_rec.modules.session_encoder import EncodedSessions, SessionEncoder


@dataclass
class Band:
    """Sessions of like length in rows, oldest click first, padding behind them: causal readers never look at it.

    Args:
        slot_L: Where each of their clicks stands, as row * T + place.
        num_rows: Number R of sessions.
        width: Places T of a row, the longest session's clicks.
    """

    slot_L: Tensor
    num_rows: int
    width: int

    def set_out(self, values_LF: Tensor) -> Tensor:
        """Values of the clicks in rows, zeros at padding, [R, T, F]."""
        rows = values_LF.new_zeros(self.num_rows * self.width, values_LF.shape[1])
        return rows.index_copy(0, self.slot_L, values_LF).unflatten(0, (self.num_rows, self.width))

    def pack(self, values_RTF: Tensor) -> Tensor:
        """Values in rows without their padding, [L, F]."""
        return values_RTF.flatten(0, 1).index_select(0, self.slot_L)


@dataclass
class ClickRows:
    """The newest clicks of each session, oldest first; short sessions stand before long ones.

    Args:
        node_L: Node of each click.
        place_L: Places from the first click on that is read of the session, 0 for that one.
        newest_B: Each session's newest click, -1 without clicks.
        source_N: Each node's newest click, -1 where none is read.
        bands: Sessions with clicks, by length; one at least.
    """

    node_L: Tensor
    place_L: Tensor
    newest_B: Tensor
    source_N: Tensor
    bands: list[Band]

    def in_rows(self, function: Callable[[Tensor], Tensor], values_LF: Tensor) -> Tensor:
        """Applies a function of rows, [R, T, F] to [R, T, F'], to values of the clicks, [L, F] to [L, F']."""
        parts = values_LF.split([band.slot_L.numel() for band in self.bands])
        return torch.cat(
            [band.pack(function(band.set_out(part))) for band, part in zip(self.bands, parts, strict=True)]
        )

    def encoded(self, states_LD: Tensor, nodes_ND: Tensor) -> EncodedSessions:
        """What is read from the states at the clicks.

        Args:
            states_LD: A state for each click.
            nodes_ND: Vectors of the nodes; a node whose clicks are all too long ago keeps its own.

        Returns:
            The states at each node's and at each session's newest click.
        """
        # A row of zeros for those without a click, also in a batch that has none at all.
        padded = torch.cat([states_LD.new_zeros(1, states_LD.shape[1]), states_LD])
        states_ND = padded.index_select(0, self.source_N + 1)
        states_ND = torch.where(self.source_N.unsqueeze(1) >= 0, states_ND, nodes_ND)
        return EncodedSessions(states_ND, padded.index_select(0, self.newest_B + 1))


class ClickEncoder(SessionEncoder):
    """An encoder that reads the newest clicks in order; no state knows later clicks.

    Args:
        max_clicks: Newest clicks that are read of a session.
    """

    reads_prefixes = True

    def __init__(self, max_clicks: int) -> None:
        super().__init__()
        self.max_clicks = max_clicks

    @abstractmethod
    def states(self, nodes_ND: Tensor, rows: ClickRows) -> Tensor:
        """A state for each click that is read, [L, D]."""

    def forward(self, nodes_ND: Tensor, graph: SessionGraph) -> EncodedSessions:
        """Encodes a batch; see `SessionEncoder.forward`."""
        rows = click_rows(graph, self.max_clicks)
        return rows.encoded(self.states(nodes_ND, rows), nodes_ND)

    def encode_prefixes(self, nodes_ND: Tensor, graph: SessionGraph, groups_G1: Tensor) -> EncodedSessions:
        """Encodes growing prefixes from the longest of each group alone; see `SessionEncoder.encode_prefixes`.

        It gives what `forward` does as long as no session has more than `max_clicks` clicks. Of a longer one, all
        prefixes of a group are read from the first click on that the longest one reads.

        Raises:
            ValueError: A group has more than `max_clicks` prefixes, so that the longest does not read all their clicks.
        """
        if int(groups_G1.diff().max()) > self.max_clicks:
            raise ValueError(f"a group has more than {self.max_clicks} prefixes, as many as clicks are read")
        rows = click_rows(graph, self.max_clicks, groups_G1)
        return rows.encoded(self.states(nodes_ND, rows), nodes_ND)


def click_rows(graph: SessionGraph, most: int, groups_G1: Tensor | None = None) -> ClickRows:
    """The clicks that are read.

    Args:
        graph: The sessions' graphs.
        most: Newest clicks kept of each session.
        groups_G1: First session of each group of growing prefixes, of which only the longest is read; None reads each
            session for itself.
    """
    offsets_B1 = graph.click_offsets_B1
    device = offsets_B1.device
    if groups_G1 is None:
        groups_G1 = torch.arange(graph.num_sessions + 1, device=device)
    longest_G = groups_G1[1:] - 1
    lengths_G = offsets_B1.diff()[longest_G].clamp(max=most)
    sorted_G, order_G = torch.sort(lengths_G, stable=True)
    starts_G1 = lengths_to_offsets(sorted_G)
    start_G = torch.empty_like(lengths_G).index_copy_(0, order_G, starts_G1[:-1])
    skipped_G = offsets_B1[groups_G1[1:]] - lengths_G
    click_L = ranges(skipped_G[order_G], starts_G1)
    group_B = torch.repeat_interleave(groups_G1.diff(), output_size=graph.num_sessions)
    # From a click of the batch to the same one of the longest prefix, and from there to the clicks that are read.
    shift_B = offsets_B1[longest_G][group_B] - offsets_B1[:-1] + (start_G - skipped_G)[group_B]
    session_C = graph.click_session_L
    number_C = torch.arange(session_C.numel(), device=device) + shift_B[session_C]
    number_C = torch.where(number_C >= start_G[group_B][session_C], number_C, -1)
    # Clicks of a session stand in order of time, so a node's largest one is its newest.
    source_N = torch.full_like(graph.node_items_N, -1).scatter_reduce(0, graph.alias_L, number_C, "amax")
    padded_C1 = torch.cat([number_C, number_C.new_full((1,), -1)])
    return ClickRows(
        node_L=graph.alias_L.index_select(0, click_L),
        place_L=ranges(torch.zeros_like(sorted_G), starts_G1),
        newest_B=padded_C1[torch.where(offsets_B1.diff() > 0, offsets_B1[1:] - 1, session_C.numel())],
        source_N=source_N,
        bands=_bands(sorted_G),
    )


def _bands(sorted_G: Tensor) -> list[Band]:
    """Bands of sessions whose lengths ascend; a band's longest is less than twice its shortest."""
    filled = sorted_G[sorted_G > 0]
    if not filled.numel():
        # A row of padding, so that gradients reach what reads rows.
        return [Band(torch.empty_like(filled), 1, 1)]
    bands = []
    for lengths in filled.split(torch.bincount(torch.log2(filled.double()).long()).tolist()):
        if lengths.numel():
            width = int(lengths[-1])
            starts = torch.arange(lengths.numel(), device=lengths.device) * width
            bands.append(Band(ranges(starts, lengths_to_offsets(lengths)), lengths.numel(), width))
    return bands
