"""The clicks of a session that a model is shown, and the sessions in which one of them is missing.

Shapes: C clicks as given, L clicks that the model is shown.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from llmgr_rec.baselines.sparse_scores import Ints
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.explanation.records import ClickState


@dataclass(frozen=True)
class SessionClicks:
    """The clicks of one session.

    Args:
        given_C: Item index of each click, oldest first; -1 for an unknown item.
        merges_repeats: Whether the model was trained without clicks on the item of the click before.
        max_length: Maximum number of clicks that the model is shown, the newest ones.
    """

    given_C: Ints
    merges_repeats: bool
    max_length: int

    @property
    def states(self) -> list[ClickState]:
        """State of each click as given."""
        states: list[ClickState] = ["unknown" if item < 0 else "merged" for item in self.given_C]
        for place in self._kept:
            states[place] = "too_old"
        for place in self.places_L:
            states[place] = "used"
        return states

    @cached_property
    def places_L(self) -> Ints:
        """Number, from 0, of each shown click in the session as given."""
        return self._kept[-self.max_length :]

    @property
    def items_L(self) -> Ints:
        """Item index of each shown click."""
        return self.given_C[self.places_L]

    @property
    def shown(self) -> Jagged:
        """Item indices of the shown clicks, one row."""
        return _rows([self.items_L])

    def left_out(self, count: int) -> Jagged:
        """The sessions without one of the newest shown clicks each, from the older to the newest, as they are shown.

        Without the click, equal clicks may follow each other, which are merged, and an older one may be shown.

        Args:
            count: Number of clicks to leave out, at most L.
        """
        kept = self.given_C[self._kept]
        rows = _rows([np.delete(kept, place) for place in range(len(kept) - count, len(kept))])
        if self.merges_repeats:
            rows = rows.without_consecutive_repeats()
        return rows.last(self.max_length)

    @cached_property
    def _kept(self) -> Ints:
        """Places of the clicks on known items that are not merged with the one before."""
        known = np.flatnonzero(self.given_C >= 0)
        if not self.merges_repeats or not len(known):
            return known
        items = self.given_C[known]
        return known[np.append(True, items[1:] != items[:-1])]


def _rows(rows: list[Ints]) -> Jagged:
    values = np.concatenate([np.zeros(0, np.int64), *rows])
    return Jagged.from_lengths(torch.from_numpy(values), torch.tensor([len(row) for row in rows], dtype=torch.int64))
