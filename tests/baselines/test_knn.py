"""Baselines against plain loops."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from llmgr_rec.baselines import knn, sparse_scores
from llmgr_rec.baselines.knn import ItemKNN, Popularity, SessionKNN, session_matrix
from llmgr_rec.baselines.sparse_scores import best_entries, cosine_similarity

sessions_of = st.lists(st.lists(st.integers(0, 14), min_size=1, max_size=6), min_size=1, max_size=12)


def flat(sessions):
    return (
        np.array([item for session in sessions for item in session], np.int64),
        np.cumsum([0, *(len(session) for session in sessions)]).astype(np.int64),
    )


def knn_reference(train, session, num_items, decay):
    """Scores of all items, straight from the definition."""
    count = Counter(item for other in train for item in set(other))
    scores = np.zeros(num_items)
    for position, clicked in enumerate(session):
        for item in range(num_items):
            both = sum(clicked in other and item in other for other in train)
            if both and item != clicked:
                recency = decay ** (len(session) - 1 - position)
                scores[item] += recency * both / math.sqrt(count[clicked] * count[item])
    return scores


@given(sessions_of, sessions_of, st.integers(1, 15))
@settings(max_examples=60, deadline=None)
def test_item_knn_equals_the_reference(train, queries, k):
    knn = ItemKNN(session_matrix([flat(train[:5]), flat(train[5:])], 15), decay=0.7)
    ids, scores = knn.rank(*flat(queries), k)
    for session, ids_K, scores_K in zip(queries, ids, scores, strict=True):
        expected = np.round(knn_reference(train, session, 15, 0.7), 12)
        best = np.argsort(-expected, kind="stable")[:k]
        np.testing.assert_allclose(scores_K, expected[best], atol=1e-11)
        np.testing.assert_allclose(expected[ids_K], expected[best], atol=1e-11)
        for left in range(k - 1):
            assert scores_K[left] > scores_K[left + 1] or ids_K[left] < ids_K[left + 1]
        assert len(set(ids_K.tolist())) == k


def session_knn_reference(train, session, num_items, decay, neighbors):
    """Scores of all items, straight from the definition."""
    count = Counter(item for other in train for item in set(other))
    likeness = []
    for number, other in enumerate(train):
        shared = sum(decay ** (len(session) - 1 - place) for place, item in enumerate(session) if item in other)
        if shared:
            likeness.append((-round(shared / math.sqrt(len(set(other))), 12), -number))
    scores = np.zeros(num_items)
    for negative, number in sorted(likeness)[:neighbors]:
        for item in set(train[-number]):
            scores[item] -= negative * math.log(len(train) / count[item])
    return scores


@given(sessions_of, sessions_of, st.integers(1, 15), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_session_knn_equals_the_reference(train, queries, k, neighbors):
    knn = SessionKNN(session_matrix([flat(train)], 15), neighbors, decay=0.7)
    _, scores = knn.rank(*flat(queries), k)
    for session, scores_K in zip(queries, scores, strict=True):
        expected = session_knn_reference(train, session, 15, 0.7, neighbors)
        np.testing.assert_allclose(scores_K, np.sort(expected)[::-1][:k], atol=1e-9)


@given(sessions_of, sessions_of, st.integers(1, 30))
@settings(max_examples=20, deadline=None)
def test_blocks_of_sessions_do_not_change_a_ranking(train, queries, block):
    whole = [knn(session_matrix([flat(train)], 15)).rank(*flat(queries), 5) for knn in (ItemKNN, SessionKNN)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "_BLOCK_SCORES", block)
        cut = [knn(session_matrix([flat(train)], 15)).rank(*flat(queries), 5) for knn in (ItemKNN, SessionKNN)]
    for one, other in zip(whole, cut, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


@given(sessions_of, st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_blocks_do_not_change_the_similarities(train, block):
    matrix = session_matrix([flat(train)], 15)
    whole = cosine_similarity(matrix)
    before = sparse_scores._BLOCK_PAIRS
    sparse_scores._BLOCK_PAIRS = block
    try:
        np.testing.assert_array_equal(cosine_similarity(matrix).toarray(), whole.toarray())
    finally:
        sparse_scores._BLOCK_PAIRS = before


def test_neighbors_keep_the_most_similar():
    train = [[0, 1], [0, 1], [0, 2], [3, 4]]
    kept = cosine_similarity(session_matrix([flat(train)], 5), k_neighbors=1).toarray()
    assert np.flatnonzero(kept[0]).tolist() == [1]
    assert np.count_nonzero(kept, axis=1).max() == 1


def test_unseen_items_are_ranked_by_index_after_the_related_ones():
    ids, scores = ItemKNN(session_matrix([flat([[3, 1]])], 5)).rank(*flat([[3], [4]]), 8)
    assert ids.tolist() == [[1, 0, 2, 3, 4, -1, -1, -1], [0, 1, 2, 3, 4, -1, -1, -1]]
    assert scores[0, :2].tolist() == [1.0, 0.0]


def test_popularity_breaks_ties_by_index():
    ids, scores = Popularity(np.array([1, 5, 5, 0])).rank(*flat([[0], [1]]), 5)
    assert ids.tolist() == [[1, 2, 0, 3, -1]] * 2
    np.testing.assert_allclose(scores[0, :4], [5 / 11, 5 / 11, 1 / 11, 0])


@pytest.mark.parametrize("k_neighbors", [1, 3, 7, 40])
def test_the_nearest_items_are_those_that_rank_first(k_neighbors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Few distinct values, so that many similarities are equal.
    features = sparse.random_array((9, 30), density=0.4, rng=np.random.default_rng(0), format="csr")
    features.data = np.ceil(2 * features.data)
    whole = cosine_similarity(features)
    entries, ranks = best_entries(whole, k_neighbors)
    rows = np.repeat(np.arange(30), np.diff(whole.indptr))
    expected = np.zeros((30, 30))
    for entry in entries[ranks < k_neighbors]:
        expected[rows[entry], whole.indices[entry]] = whole.data[entry]
    for share in (0, 100):
        monkeypatch.setattr(sparse_scores, "_MIN_SHARE", share)
        np.testing.assert_allclose(cosine_similarity(features, k_neighbors).toarray(), expected, rtol=1e-15)
