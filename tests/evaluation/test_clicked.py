"""Lists without what was clicked, against plain loops."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmgr_rec.evaluation.clicked import leaves_out_clicked, ranked_by, ranking_rule, without_clicked

from llmgr_rec.baselines.knn import Popularity
from llmgr_rec.data.batch import RawSessions
from tests.baselines.test_knn import flat
from tests.small_run import small_run, without_repeats

NUM_ITEMS = 12
SESSIONS = st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), max_size=7), min_size=1, max_size=8)


def reference(ids: list[int], session: list[int], k: int) -> list[int]:
    left = [item for item in ids if item >= 0 and item not in session][:k]
    return left + [-1] * (k - len(left))


@given(SESSIONS, st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_what_is_left_is_that_of_a_plain_loop(sessions, k, seed):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(NUM_ITEMS) for _ in sessions])
    ids[:, NUM_ITEMS - int(rng.integers(4)) :] = -1
    found = without_clicked(ids, *flat(sessions), k)
    expected = [reference(row, session, k) for row, session in zip(ids.tolist(), sessions, strict=True)]
    assert found.tolist() == expected


@given(SESSIONS, st.integers(1, NUM_ITEMS + 3))
@settings(max_examples=40, deadline=None)
def test_a_baseline_fills_all_places_that_unclicked_items_can_fill(sessions, k):
    popularity = Popularity(np.arange(NUM_ITEMS)[::-1].copy())
    items, offsets = (torch.from_numpy(array) for array in flat(sessions))
    none_B = torch.full((len(sessions),), -1)
    raw = RawSessions(items, offsets, none_B, torch.ones(len(sessions)), none_B, len(sessions))
    order = [*range(NUM_ITEMS)]
    assert ranked_by(popularity, raw, k, True).tolist() == [reference(order, session, k) for session in sessions]
    assert ranked_by(popularity, raw, k, False).tolist() == [reference(order, [], k)] * len(sessions)


def test_the_data_set_decides_and_the_words_say_so():
    assert not leaves_out_clicked(small_run().dataset)
    assert ranking_rule(small_run().dataset) == "no item excluded"
    assert leaves_out_clicked(without_repeats())
    assert ranking_rule(without_repeats()) == "clicked items left out: no training session repeats one"
