"""Items held out of training, to measure recommendations of items that are known by their text only.

Shape suffixes: V items, U users of a block, L clicks of the block.
"""

import numpy as np
import numpy.typing as npt

from llmgr_rec.data.preparation.database import Database
from llmgr_rec.data.preparation.windows import Ints
from llmgr_rec.errors import UserError

Bools = npt.NDArray[np.bool_]


def choose_held_out(database: Database, num_items: int, share: float, seed: int) -> Bools:
    """Chooses the held-out items by a hash of their raw ids.

    An item is held out if the last 8 bytes of md5("SEED:ITEM_ID"), as a little-endian integer, are below share * 2^64.
    The choice does not depend on the order of rows or on other items, and a larger share adds items to the choice of a
    smaller one.

    Args:
        database: Scratch database with tables items and catalog.
        num_items: Number of items in the catalog.
        share: Expected share of held-out items, in [0, 1).
        seed: Seed of the choice.

    Returns:
        Whether each item is held out, bool [V].

    Raises:
        UserError: The share is above 0, but no item is chosen.
    """
    held_out_V = np.zeros(num_items, np.bool_)
    if not share:
        return held_out_V
    # md5 is the same in all versions of DuckDB.
    chosen = database.stream(
        'SELECT c."index" FROM catalog c JOIN items i USING (key) '
        f"WHERE md5_number_lower('{seed}:' || CAST(i.item_id AS VARCHAR)) < CAST({int(share * 2**64)} AS UBIGINT)"
    )
    for batch in chosen:
        held_out_V[batch.column(0).to_numpy()] = True
    if not held_out_V.any():
        raise UserError(
            f"--hold_out_items {share} holds out none of {num_items:,} items; give a larger share or another "
            "--hold_out_seed"
        )
    return held_out_V


class HeldOutFilter:
    """Removes clicks on held-out items from training sessions, and counts what it removes.

    Args:
        held_out_V: Whether each item is held out.

    Attributes:
        clicks: Number of removed training clicks.
        sessions: Number of training sessions left with fewer than two clicks.
    """

    def __init__(self, held_out_V: Bools) -> None:
        self.held_out_V = held_out_V
        self.clicks = 0
        self.sessions = 0

    def trains(self, offsets_U1: Ints, items_L: Ints, end_U: Ints) -> Bools:
        """Whether each click of a block is a training click that is not removed, bool [L].

        Args:
            offsets_U1: Offsets of the users' clicks.
            items_L: Item indices.
            end_U: Position after the last training click of each user.
        """
        return _training_clicks(offsets_U1, end_U) & ~self.held_out_V[items_L]

    def __call__(self, offsets_U1: Ints, items_L: Ints, end_U: Ints) -> tuple[Ints, Ints]:
        """The training clicks of a block without those on held-out items.

        Args:
            offsets_U1: Offsets of the users' clicks.
            items_L: Item indices.
            end_U: Position after the last training click of each user.

        Returns:
            Offsets [U + 1] and item indices of the remaining clicks. A user may have none.
        """
        start_U = offsets_U1[:-1]
        kept_L = self.trains(offsets_U1, items_L, end_U)
        kept_U = np.add.reduceat(kept_L.astype(np.int64), start_U)
        self.clicks += int((_training_clicks(offsets_U1, end_U) & self.held_out_V[items_L]).sum())
        self.sessions += int(((end_U - start_U >= 2) & (kept_U < 2)).sum())
        return np.concatenate([[0], np.cumsum(kept_U)]).astype(np.int64), items_L[kept_L]


def _training_clicks(offsets_U1: Ints, end_U: Ints) -> Bools:
    """Whether each click is of a training session. One click is none: a row needs a history and a target."""
    start_U = offsets_U1[:-1]
    end_U = np.where(end_U - start_U >= 2, end_U, start_U)
    return np.arange(offsets_U1[-1]) < np.repeat(end_U, np.diff(offsets_U1))
