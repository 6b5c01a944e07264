"""What a ranking shows and excludes of a session: its newest clicks, and, if repeats are excluded, their items.

`prepare` decides on repeats by their measured share (`data.repeats`) and limits the length of histories. A bundle
records both, and `evaluate` and `score` follow it. Only items of clicks that the model sees are excluded, because a
prepared data set has no others.

Shapes: B sessions, L clicks, D items of a list before exclusion, K after.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch

from llmgr_rec.baselines.knn import Baseline
from llmgr_rec.baselines.sparse_scores import Floats, Ints
from llmgr_rec.config import Domains
from llmgr_rec.data.batch import RawSessions, SessionBatch
from llmgr_rec.data.dataset import Manifest
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.repeats import Repeats, RepeatsOption
from llmgr_rec.errors import UserError
from llmgr_rec.storage.bundle_index import BundleIndex

# Clicks that are shown where a bundle of an earlier version does not say it.
_DEFAULT_MAX_LENGTH = 50


@dataclass(frozen=True)
class RankingRule:
    """What a ranking shows and excludes of a session.

    Args:
        repeats: Whether the list may contain items of the clicks that are shown.
        max_length: Maximum number of clicks that are shown, the newest ones.
        domains: Which items a list may have, where the catalog has several domains: those of the session's, or all.
    """

    repeats: Repeats
    max_length: int
    domains: Domains = "own"

    @property
    def excludes_seen(self) -> bool:
        """Whether the items of the clicks that are shown are excluded from the list."""
        return self.repeats == "exclude"

    def record(self, has_domains: bool) -> dict[str, str | int]:
        """The rule as values of JSON, without what has no meaning for a catalog of one log.

        Args:
            has_domains: Whether the catalog has domains.
        """
        values = asdict(self)
        if not has_domains:
            del values["domains"]
        return values

    def ranked_items(self, has_domains: bool) -> str:
        """Which items are ranked, in words.

        Args:
            has_domains: Whether the catalog has domains.
        """
        return "items of the session's domain" if has_domains and self.domains == "own" else "full catalog"

    def __str__(self) -> str:
        return "clicked items excluded" if self.excludes_seen else "no item excluded"


def ranking_rule(
    recorded: Manifest | BundleIndex,
    repeats: RepeatsOption = "auto",
    max_length: int | None = None,
    domains: Domains = "own",
) -> RankingRule:
    """The rule of a data set or a bundle, with what the user asks for instead.

    Args:
        recorded: Manifest of the data set, or index of the bundle.
        repeats: `auto` takes what is recorded.
        max_length: None takes what is recorded.
        domains: Which items a list may have.
    """
    return RankingRule(
        repeats=recorded.repeats if repeats == "auto" else repeats,
        max_length=max_length or recorded.max_length or _DEFAULT_MAX_LENGTH,
        domains=domains,
    )


def rule_of_bundles(
    indexes: Mapping[str, BundleIndex],
    manifest: Manifest,
    repeats: RepeatsOption = "auto",
    max_length: int | None = None,
    domains: Domains = "own",
) -> RankingRule:
    """The rule by which the models of a run and the baselines are compared.

    Args:
        indexes: Index of each bundle by the name of its model; empty to compare baselines only.
        manifest: Manifest of the data set, which is the rule without bundles.
        repeats: `auto` takes what the bundles record.
        max_length: None takes what the bundles record, or the data set where they record nothing.
        domains: Which items a list may have.

    Raises:
        UserError: The bundles record different rules, or the data set has shorter histories than asked for.
    """
    if (max_length or 0) > manifest.max_length:
        raise UserError(
            f"--max_length is {max_length}, but the histories of the data set end at {manifest.max_length} clicks; "
            f"prepare it with --max_length {max_length}, or give at most {manifest.max_length}"
        )
    rules = {
        name: ranking_rule(index, repeats, max_length or index.max_length or manifest.max_length, domains)
        for name, index in indexes.items()
    }
    if not rules:
        return ranking_rule(manifest, repeats, max_length, domains)
    if len(set(rules.values())) > 1:
        recorded = "; ".join(f"{name}: {rule.repeats}, {rule.max_length}" for name, rule in rules.items())
        raise UserError(
            f"the models record different repeats and max_length ({recorded}); give --repeats and --max_length, or "
            "one of the models in --models"
        )
    return next(iter(rules.values()))


def seen_items(batch: SessionBatch) -> Jagged:
    """The distinct items that each session of a batch has clicked, int64, one row per session."""
    return Jagged(batch.graph.node_items_N, batch.graph.node_offsets_B1)


# Clicks of a session that is not worth a call of its own.
_SHORT = 8


def ranked_by(baseline: Baseline, sessions: RawSessions, k: int, exclude_seen: bool) -> tuple[Ints, Floats]:
    """The K best items of each session by a baseline, int64 [B, K], best first, and their scores, float64 [B, K].

    Shorter lists are padded with -1 and -inf.

    Args:
        baseline: The baseline; it ranks the whole catalog, seen items included.
        sessions: The sessions.
        k: Number K of items.
        exclude_seen: Whether to exclude the items that the session has clicked.
    """
    if not exclude_seen:
        return baseline.rank(sessions.items_L.numpy(), sessions.offsets_B1.numpy(), k)
    clicks = Jagged(sessions.items_L, sessions.offsets_B1)
    ids_BK, scores_BK = np.empty((clicks.num_rows, k), np.int64), np.empty((clicks.num_rows, k))
    for rows in _rows_of_similar_length(clicks.lengths.numpy()):
        some = clicks.select(torch.from_numpy(rows))
        items_L, offsets_B1 = some.values.numpy(), some.offsets.numpy()
        longest = int(np.diff(offsets_B1).max())
        ranked = baseline.rank(items_L, offsets_B1, k + longest)
        ids_BK[rows], scores_BK[rows] = without_seen(*ranked, items_L, offsets_B1, k)
    return ids_BK, scores_BK


def _rows_of_similar_length(lengths_B: Ints) -> list[Ints]:
    """Rows of sessions by the power of two that their length does not exceed, so that few are ranked too deep."""
    power_B = np.ceil(np.log2(np.maximum(lengths_B, _SHORT)))
    return [np.flatnonzero(power_B == power) for power in np.unique(power_B)]


def without_seen(ids_BD: Ints, scores_BD: Floats, items_L: Ints, offsets_B1: Ints, k: int) -> tuple[Ints, Floats]:
    """The first K items of each list that its session has not clicked, int64 [B, K], and their scores.

    Shorter lists are padded with -1 and -inf.

    Args:
        ids_BD: Item indices, best first; -1 pads shorter lists.
        scores_BD: Their scores.
        items_L: Clicked items of the sessions.
        offsets_B1: Start of each session in `items_L` and, last, their number.
        k: Number K of items, at most D.
    """
    lengths_B = np.diff(offsets_B1)
    is_kept_BD = ids_BD >= 0
    for place in range(int(lengths_B.max(initial=0))):
        clicks_B = items_L[np.minimum(offsets_B1[:-1] + place, len(items_L) - 1)]
        is_kept_BD &= (ids_BD != clicks_B[:, None]) | (place >= lengths_B)[:, None]
    column_BD = np.cumsum(is_kept_BD, axis=1) - 1
    rows, places = np.divmod(np.flatnonzero(is_kept_BD & (column_BD < k)), ids_BD.shape[1])
    columns = column_BD[rows, places]
    ids_BK, scores_BK = np.full((len(ids_BD), k), -1, np.int64), np.full((len(ids_BD), k), -np.inf)
    ids_BK[rows, columns], scores_BK[rows, columns] = ids_BD[rows, places], scores_BD[rows, places]
    return ids_BK, scores_BK
