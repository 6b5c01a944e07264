"""Lists without seen items, against plain loops."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmgr_rec.baselines.knn import Popularity
from llmgr_rec.data.batch import RawSessions
from llmgr_rec.evaluation.exclusion import excludes_seen, ranked_by, ranking_rule, without_seen
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
    found = without_seen(ids, *flat(sessions), k)
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
    assert ranked_by(popularity, raw, k, True).tolist() == [reference(order, session, k) for session in sessions]
    assert ranked_by(popularity, raw, k, False).tolist() == [reference(order, [], k)] * len(sessions)


def test_the_data_set_decides_and_the_ranking_rule_says_so():
    assert not excludes_seen(small_run().dataset)
    assert ranking_rule(small_run().dataset) == "no item excluded"
    assert excludes_seen(without_repeats())
    assert ranking_rule(without_repeats()) == "clicked items excluded: no training session repeats one"
