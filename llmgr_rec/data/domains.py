"""Domains of a catalog that was prepared from several logs. Item `B001` of domain `beauty` has the id `beauty:B001`.

The domain of a session is that of its newest click. Catalogs from one log have no domains.

Shapes: V items, B sessions, L clicks.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.schema import domains_of_ids
from llmgr_rec.errors import UserError, did_you_mean


@dataclass(frozen=True)
class ItemDomains:
    """The domain of each item.

    Args:
        names: Names of the domains, in the order of their first items.
        of_item_V: Place in `names` of the domain of each item, int16.
    """

    names: tuple[str, ...]
    of_item_V: Tensor

    @classmethod
    def of_column(cls, names_V: pa.DictionaryArray) -> "ItemDomains":
        """The domains of a catalog.

        Args:
            names_V: Name of the domain of each item; the dictionary has them in the order of their first items.
        """
        return cls(tuple(names_V.dictionary.to_pylist()), torch.from_numpy(names_V.indices.to_numpy().astype(np.int16)))

    def place(self, name: str) -> int:
        """Place of a domain in `names`.

        Args:
            name: Its name.

        Raises:
            UserError: There is no such domain.
        """
        if name not in self.names:
            raise UserError(f"there is no domain {name!r}{did_you_mean(str(name), self.names)}")
        return self.names.index(name)

    def items(self, domain: int) -> Tensor:
        """Indices of the items of a domain, ascending, int64.

        Args:
            domain: Place of the domain in `names`.
        """
        return (self.of_item_V == domain).nonzero().squeeze(1)

    def of_ids(self, ids_L: pa.Array, offsets_B1: NDArray[np.int64]) -> NDArray[np.int64]:
        """Place of the domain that the newest id of each session names, int64 [B]; -1 if there is no such domain.

        Args:
            ids_L: Ids of the clicks of all sessions, oldest first, of items that may be unknown.
            offsets_B1: First click of each session; the last entry is L.
        """
        place_B = np.full(len(offsets_B1) - 1, -1)
        has_clicks = np.flatnonzero(np.diff(offsets_B1))
        newest = ids_L.take(pa.array(offsets_B1[1:][has_clicks] - 1))
        # Numbers name no domain.
        names = domains_of_ids(newest.cast(pa.string()))
        place_B[has_clicks] = pc.index_in(names, pa.array(self.names)).fill_null(-1).to_numpy(zero_copy_only=False)
        return place_B

    def of_sessions(self, clicks: Jagged) -> Tensor:
        """Place of the domain of each session, int16 [B]; -1 for a session without clicks.

        Args:
            clicks: Item indices of each session, oldest first; on any device.
        """
        newest = clicks.offsets[1:] - 1
        if not clicks.values.numel():
            return torch.full_like(newest, -1, dtype=torch.int16)
        of_item_V = self.of_item_V.to(clicks.values.device)
        return torch.where(clicks.lengths > 0, of_item_V[clicks.values[newest.clamp(min=0)]], -1)
