"""Items that training never sees, so that what is recommended of them is recommended from their text.

Shape suffixes: V items, U users of a block, L their clicks end to end.
"""

import numpy as np
import numpy.typing as npt

from llmgr_rec.data.preparation.database import Database
from llmgr_rec.data.preparation.windows import Ints
from llmgr_rec.errors import UserError

Bools = npt.NDArray[np.bool_]


def choose_held_out(database: Database, num_items: int, share: float, seed: int) -> Bools:
    """Chooses items by the hash of their raw ids alone.

    An item is held out where the last 8 bytes of md5("SEED:ITEM_ID"), the first of them the lowest, make a number below
    share * 2^64. So neither the order of rows nor another item has a part in it, and a larger share holds out the same
    items and more.

    Args:
        database: Scratch database with tables items and catalogue.
        num_items: Items in the catalogue.
        share: Expected share of the items, 0 to below 1.
        seed: Of the choice.

    Returns:
        Whether each item is held out, [V].

    Raises:
        UserError: The share is above 0, but no item is chosen.
    """
    held_out_V = np.zeros(num_items, np.bool_)
    if not share:
        return held_out_V
    # md5, because it stays the same in every version of DuckDB.
    chosen = database.stream(
        'SELECT c."index" FROM catalogue c JOIN items i USING (key) '
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


class TrainingCut:
    """Takes held-out items out of training sessions, and counts what that costs.

    Args:
        held_out_V: Whether each item is held out.
    """

    def __init__(self, held_out_V: Bools) -> None:
        self.held_out_V = held_out_V
        self.clicks = 0
        self.sessions = 0

    def __call__(self, offsets_U1: Ints, items_L: Ints, end_U: Ints) -> tuple[Ints, Ints]:
        """The training clicks of a block without held-out items.

        Args:
            offsets_U1: Bounds of the users' clicks.
            items_L: Item indices.
            end_U: One past each user's last training click.

        Returns:
            Bounds [U + 1] and item indices of the clicks that stay; a user may be left with none.
        """
        start_U = offsets_U1[:-1]
        # A row takes two clicks, a history and a target: what has fewer is no training session to begin with.
        trains_U = end_U - start_U >= 2
        trains_L = np.arange(len(items_L)) < np.repeat(np.where(trains_U, end_U, start_U), np.diff(offsets_U1))
        held_L = self.held_out_V[items_L]
        stays_L = trains_L & ~held_L
        stay_U = np.add.reduceat(stays_L.astype(np.int64), start_U)
        self.clicks += int((trains_L & held_L).sum())
        self.sessions += int((trains_U & (stay_U < 2)).sum())
        return np.concatenate([[0], np.cumsum(stay_U)]).astype(np.int64), items_L[stays_L]
