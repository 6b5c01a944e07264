"""A baseline whose lists have items of the domain of the session only.

Shapes: B sessions or lists, L clicks, R items of a domain, K items of a list.
"""

from typing import Protocol, runtime_checkable

import numpy as np
import torch

from llmgr_rec.baselines.knn import Baseline, Popularity
from llmgr_rec.baselines.sparse_scores import Floats, Ints
from llmgr_rec.data.domains import ItemDomains
from llmgr_rec.data.jagged import Jagged

# Sessions whose whole lists are in memory at a time, for a baseline that cannot rank some of the items.
_BLOCK_SESSIONS = 256


@runtime_checkable
class RanksSome(Baseline, Protocol):
    """A baseline that can rank some of the items only."""

    def among(self, items_R: Ints) -> Baseline:
        """The baseline of some items, in whose lists an item is its place among them.

        Args:
            items_R: Item indices, ascending.
        """
        ...


class InDomains:
    """Ranks the items of the domain of each session, which is that of its newest click; all items without a click.

    Args:
        baseline: Ranks the whole catalog.
        domains: The domain of each item.
    """

    def __init__(self, baseline: Baseline, domains: ItemDomains) -> None:
        self._baseline, self._domains = baseline, domains
        self._of_domain: dict[int, Baseline] = {}

    def rank(self, items_L: Ints, offsets_B1: Ints, k: int) -> tuple[Ints, Floats]:
        """See `Baseline.rank`."""
        clicks = Jagged(torch.from_numpy(items_L), torch.from_numpy(offsets_B1))
        domain_B = self._domains.of_sessions(clicks).numpy()
        ids_BK, scores_BK = np.full((len(domain_B), k), -1), np.full((len(domain_B), k), -np.inf)
        for domain in np.unique(domain_B).tolist():
            rows = np.flatnonzero(domain_B == domain)
            some = clicks.select(torch.from_numpy(rows))
            ids_BK[rows], scores_BK[rows] = self._rank_domain(domain, some.values.numpy(), some.offsets.numpy(), k)
        return ids_BK, scores_BK

    def _rank_domain(self, domain: int, items_L: Ints, offsets_B1: Ints, k: int) -> tuple[Ints, Floats]:
        if domain < 0:
            return self._baseline.rank(items_L, offsets_B1, k)
        items_R = self._domains.items(domain).numpy()
        if domain not in self._of_domain:
            if isinstance(self._baseline, RanksSome):
                self._of_domain[domain] = self._baseline.among(items_R)
            else:
                self._of_domain[domain] = _Chosen(self._baseline, self._domains, domain)
        places, scores = self._of_domain[domain].rank(items_L, offsets_B1, k)
        return np.where(places >= 0, items_R[places], places), scores


class _Chosen:
    """Places of the items of a domain in the whole lists of a baseline."""

    def __init__(self, baseline: Baseline, domains: ItemDomains, domain: int) -> None:
        self._baseline = baseline
        is_chosen_V = (domains.of_item_V == domain).numpy()
        self._place_V = np.where(is_chosen_V, np.cumsum(is_chosen_V) - 1, -1)

    def rank(self, items_L: Ints, offsets_B1: Ints, k: int) -> tuple[Ints, Floats]:
        """See `Baseline.rank`."""
        num_sessions = len(offsets_B1) - 1
        places_BK, scores_BK = np.full((num_sessions, k), -1), np.full((num_sessions, k), -np.inf)
        for start in range(0, num_sessions, _BLOCK_SESSIONS):
            ends = offsets_B1[start : start + _BLOCK_SESSIONS + 1]
            ids_UV, scores_UV = self._baseline.rank(items_L[ends[0] : ends[-1]], ends - ends[0], len(self._place_V))
            places_UV = np.where(ids_UV >= 0, self._place_V[ids_UV], -1)
            # Those of the domain first, in their order.
            order_UK = np.argsort(places_UV < 0, axis=1, kind="stable")[:, :k]
            found_UK = np.take_along_axis(places_UV, order_UK, axis=1)
            block = np.s_[start : start + len(found_UK), : found_UK.shape[1]]
            places_BK[block] = found_UK
            scores_BK[block] = np.where(found_UK >= 0, np.take_along_axis(scores_UV, order_UK, axis=1), -np.inf)
        return places_BK, scores_BK


def popular_items(popularity: Popularity, domains: ItemDomains | None, domain_B: Ints, k: int) -> tuple[Ints, Floats]:
    """The most popular items of some domains, as `Baseline.rank`; those of all domains for place -1.

    Args:
        popularity: Ranks the whole catalog.
        domains: The domain of each item; None for a catalog of one log.
        domain_B: Place of each domain.
        k: Length K of the lists.
    """
    ids_BK, scores_BK = np.full((len(domain_B), k), -1), np.full((len(domain_B), k), -np.inf)
    for domain in np.unique(domain_B).tolist():
        rows, nothing = domain_B == domain, (np.zeros(0, np.int64), np.zeros(2, np.int64))
        if domains is None or domain < 0:
            ids_BK[rows], scores_BK[rows] = popularity.rank(*nothing, k)
            continue
        items_R = domains.items(domain).numpy()
        places, scores_BK[rows] = popularity.among(items_R).rank(*nothing, k)
        ids_BK[rows] = np.where(places >= 0, items_R[places], places)
    return ids_BK, scores_BK


def in_domains(baseline: Baseline, domains: ItemDomains | None) -> Baseline:
    """A baseline that ranks the items of the domain of each session.

    Args:
        baseline: Ranks the whole catalog.
        domains: The domain of each item; None leaves the baseline as it is.
    """
    return baseline if domains is None else InDomains(baseline, domains)
