"""Clicks of sessions for encoders that read a session as a sequence: end to end without padding, or set out in rows.

Shapes: B sessions, L clicks that are read of all sessions, N nodes, R rows of T places, D and F columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.data.jagged import lengths_to_offsets, ranges
from llmgr_rec.modules.session_encoder import EncodedSessions


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
        back_L: Places from the session's newest click back, 0 for that one.
        newest_B: Each session's newest click, -1 without clicks.
        source_N: Each node's newest click, -1 where none is read.
        bands: Sessions with clicks, by length; one at least.
    """

    node_L: Tensor
    back_L: Tensor
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


def click_rows(graph: SessionGraph, most: int) -> ClickRows:
    """The clicks that are read.

    Args:
        graph: The sessions' graphs.
        most: Newest clicks kept of each session.
    """
    lengths_B = graph.click_offsets_B1.diff().clamp(max=most)
    order_B = torch.argsort(lengths_B, stable=True)
    sorted_B = lengths_B[order_B]
    offsets_B1 = lengths_to_offsets(sorted_B)
    click_L = ranges((graph.click_offsets_B1[1:] - lengths_B)[order_B], offsets_B1)
    node_L = graph.alias_L.index_select(0, click_L)
    number_L = torch.arange(node_L.numel(), device=node_L.device)
    newest_B = torch.empty_like(lengths_B)
    newest_B[order_B] = torch.where(sorted_B > 0, offsets_B1[1:] - 1, -1)
    # Clicks of a session stand in order of time, so a node's largest one is its newest.
    source_N = torch.full_like(graph.node_items_N, -1).scatter_reduce(0, node_L, number_L, "amax")
    return ClickRows(
        node_L=node_L,
        back_L=torch.repeat_interleave(offsets_B1[1:], sorted_B, output_size=node_L.numel()) - 1 - number_L,
        newest_B=newest_B,
        source_N=source_N,
        bands=_bands(sorted_B),
    )


def _bands(sorted_B: Tensor) -> list[Band]:
    """Bands of sessions whose lengths ascend; a band's longest is less than twice its shortest."""
    filled = sorted_B[sorted_B > 0]
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
