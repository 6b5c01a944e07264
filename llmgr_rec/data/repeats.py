"""Repeats, clicks on an item that the session has clicked before: their measured shares, and the rule for rankings.

If sessions hardly ever return to an item, the items that a session has clicked are excluded from its ranking, in which
they would take the first places. If sessions do return, they are allowed. This is the one place where that is decided.
Imports only the standard library, so that `--help` is fast.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# Whether a ranking may contain the items that the session has clicked.
Repeats = Literal["allow", "exclude"]
RepeatsOption = Literal["auto", "allow", "exclude"]
# Two clicks in a row on the same item: both are kept, or merged into the first.
ConsecutiveRepeats = Literal["keep", "merge"]

# From this share of repeated targets in any split, repeats are allowed. Exclusion loses each repeated target; without
# exclusion, all other targets lose the places that clicked items take. docs/data.md has the measurements.
MIN_SHARE_TO_ALLOW = 0.05
# Largest maximum length of a history, in clicks.
LARGEST_MAX_LENGTH = 2**31


@dataclass(frozen=True)
class RepeatCounts:
    """Repeats in one split.

    Args:
        clicks: Number of clicks.
        repeated_clicks: Clicks on an item that the session has clicked before.
        targets: Number of targets.
        repeated_targets: Targets that are in their history, which has at most max_length clicks.
    """

    clicks: int
    repeated_clicks: int
    targets: int
    repeated_targets: int

    @property
    def click_share(self) -> float:
        """Share of repeated clicks, 0 without clicks."""
        return self.repeated_clicks / self.clicks if self.clicks else 0.0

    @property
    def target_share(self) -> float:
        """Share of repeated targets, 0 without targets."""
        return self.repeated_targets / self.targets if self.targets else 0.0


def decide_repeats(option: RepeatsOption, counts: Mapping[str, RepeatCounts]) -> Repeats:
    """The rule for the rankings of a data set and of the models trained on it.

    Args:
        option: `auto` decides by the greatest share of repeated targets of a split; the others are the decision.
        counts: Repeats of each split.
    """
    if option != "auto":
        return option
    share = max((split.target_share for split in counts.values()), default=0.0)
    return "allow" if share >= MIN_SHARE_TO_ALLOW else "exclude"
