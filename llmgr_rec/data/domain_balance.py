"""How often an epoch has the examples of each domain.

Shapes: R rows.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmgr_rec.data.domains import ItemDomains

Ints = NDArray[np.int64]
# Examples of a domain that are none, but an error of rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class DomainBalance:
    """Gives each domain a share of the examples of an epoch by its size.

    Args:
        domains: The domain of each item.
        power: The share is as the number of examples to this power: with 1, an epoch has each example once; with 0, as
            many of each domain, so that those of a small one come several times.
    """

    domains: ItemDomains
    power: float

    def order(self, first_items_R: Ints, sizes_R: Ints, generator: np.random.Generator) -> Ints:
        """A random order of rows, in which some come several times and others not at all.

        Args:
            first_items_R: First item of each row, which has its domain.
            sizes_R: Number of examples of each row.
            generator: Draws the order.

        Returns:
            The rows, with at least as many examples as all rows have.
        """
        domain_R = self.domains.of_item_V.numpy()[first_items_R].astype(np.int64)
        size_D = np.bincount(domain_R, weights=sizes_R)
        share_D = np.where(size_D > 0, np.maximum(size_D, 1) ** self.power, 0)
        wanted_D = size_D.sum() * share_D / share_D.sum()
        drawn = [np.zeros(0, np.int64)]
        for domain in np.flatnonzero(size_D).tolist():
            rows = np.flatnonzero(domain_R == domain)
            copies, rest = divmod(wanted_D[domain], size_D[domain])
            shuffled = generator.permutation(rows)
            reached = np.cumsum(sizes_R[shuffled])
            drawn += [rows] * int(copies)
            if rest > _ROUNDING:
                drawn.append(shuffled[: np.searchsorted(reached, rest - _ROUNDING) + 1])
        return generator.permutation(np.concatenate(drawn))
