"""Lists without seen items, against plain loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmgr_rec.baselines.knn import Popularity
from llmgr_rec.data.batch import RawSessions
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.exclusion import RankingRule, ranked_by, ranking_rule, rule_of_bundles, without_seen
from llmgr_rec.storage.bundle_index import read_index
from tests.baselines.test_knn import flat
from tests.small_run import small_run, without_repeats

NUM_ITEMS = 12
SESSIONS = st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), max_size=7), min_size=1, max_size=8)


def reference(ids: list[int], session: list[int], k: int) -> list[int]:
    left = [item for item in ids if item >= 0 and item not in session][:k]
    return left + [-1] * (k - len(left))


@given(SESSIONS, st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_exclusion_equals_a_plain_loop(sessions, k, seed):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(NUM_ITEMS) for _ in sessions])
    ids[:, NUM_ITEMS - int(rng.integers(4)) :] = -1
    found, scores = without_seen(ids, -ids.astype(np.float64), *flat(sessions), k)
    assert np.array_equal(scores, np.where(found < 0, -np.inf, -found))
    expected = [reference(row, session, k) for row, session in zip(ids.tolist(), sessions, strict=True)]
    assert found.tolist() == expected


@given(SESSIONS, st.integers(1, NUM_ITEMS + 3))
@settings(max_examples=40, deadline=None)
def test_a_baseline_fills_all_positions_that_unseen_items_can_fill(sessions, k):
    popularity = Popularity(np.arange(NUM_ITEMS)[::-1].copy())
    items, offsets = (torch.from_numpy(array) for array in flat(sessions))
    none_B = torch.full((len(sessions),), -1)
    raw = RawSessions(items, offsets, none_B, torch.ones(len(sessions)), none_B, len(sessions))
    order = [*range(NUM_ITEMS)]
    assert ranked_by(popularity, raw, k, True)[0].tolist() == [reference(order, session, k) for session in sessions]
    assert ranked_by(popularity, raw, k, False)[0].tolist() == [reference(order, [], k)] * len(sessions)


def test_the_rule_is_what_is_recorded_unless_asked_for():
    shared, excluding = small_run().dataset.manifest, without_repeats().manifest
    assert (str(ranking_rule(shared)), str(ranking_rule(excluding))) == ("no item excluded", "clicked items excluded")
    assert ranking_rule(shared, "exclude", 7) == RankingRule("exclude", 7)
    index = read_index(small_run().run / "export" / "sbr")
    recorded = [replace(index, repeats=repeats, max_length=9) for repeats in ("allow", "exclude", "allow")]
    # The models of the run decide over the data set, and have to agree.
    assert rule_of_bundles({"sbr": recorded[1]}, shared, "auto", None) == RankingRule("exclude", 9)
    assert rule_of_bundles({"sbr": index}, excluding, "auto", None) == RankingRule("allow", shared.max_length)
    assert rule_of_bundles({}, excluding, "auto", None) == RankingRule("exclude", excluding.max_length)
    differing = {"sbr": recorded[0], "llmgr": recorded[1]}
    with pytest.raises(UserError, match=r"sbr: allow, 9; llmgr: exclude, 9\); give --repeats"):
        rule_of_bundles(differing, shared, "auto", None)
    assert rule_of_bundles(differing, shared, "exclude", None) == RankingRule("exclude", 9)
    with pytest.raises(UserError, match=r"--max_length is 51, but the histories of the data set end at 50 clicks"):
        rule_of_bundles({}, shared, "auto", 51)
