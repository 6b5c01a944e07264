"""Baselines against plain loops."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from llmgr_rec.baselines import item_similarity, knn
from llmgr_rec.baselines.item_similarity import cosine_similarity
from llmgr_rec.baselines.knn import ItemKNN, ItemNeighbors, Popularity, SessionKNN, session_matrix
from llmgr_rec.baselines.sparse_scores import best_entries, top_k
from llmgr_rec.kernels import sparse_product

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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item_similarity, "_BLOCK_ADDITIONS", block)
        patch.setattr(sparse_product, "_BLOCK_VALUES", 64 * block)
        np.testing.assert_array_equal(cosine_similarity(matrix).toarray(), whole.toarray())


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
    features = sparse.random_array((9, 300), density=0.4, rng=np.random.default_rng(0), format="csr")
    features.data = np.ceil(2 * features.data)
    whole = cosine_similarity(features).toarray()
    columns = np.argsort(-np.round(whole, 12), axis=1, kind="stable")[:, :k_neighbors]
    expected = np.zeros((300, 300))
    np.put_along_axis(expected, columns, np.take_along_axis(whole, columns, axis=1), axis=1)
    for share in (0, 1000):
        monkeypatch.setattr(sparse_product, "_COLUMNS_PER_ADDITION", share)
        np.testing.assert_allclose(cosine_similarity(features, k_neighbors).toarray(), expected, rtol=1e-14)


@pytest.mark.parametrize("digits", [1, 6])
@pytest.mark.parametrize("k", [1, 5, 20, 400])
def test_the_best_of_dense_and_of_sparse_rows_are_those_of_a_stable_sort(digits: int, k: int) -> None:
    rng = np.random.default_rng(k)
    similarity = sparse.random_array((50, 333), density=0.1, rng=rng, format="csr")
    similarity.data = np.round(similarity.data, digits)
    # Repeated items, a session without similar items and one without clicks.
    items, offsets = np.append(rng.integers(0, 50, 90), 7), np.array([0, 1, 40, 40, 60, 90, 91])
    similarity.data[similarity.indptr[7] : similarity.indptr[8]] = 0
    similarity.eliminate_zeros()
    baseline = ItemNeighbors(similarity, 0.7)
    scores = np.round(baseline.scores(items, offsets).toarray(), 12)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    filled = np.full((6, max(k - 333, 0)), -1)
    for share in (0, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sparse_product, "_COLUMNS_PER_ADDITION", share)
            ids, found = baseline.rank(items, offsets, k)
        np.testing.assert_array_equal(ids, np.hstack([expected, filled]))
        np.testing.assert_array_equal(found[:, :333], np.take_along_axis(scores, expected, axis=1))
        assert np.isneginf(found[:, 333:]).all()


def test_entries_are_ranked_in_their_order_of_columns_if_tied() -> None:
    scores = sparse.csr_array(([0.5, 0.5, 1.0, 0.5, 2.0], [4, 1, 3, 0, 2], [0, 4, 4, 5]), shape=(3, 6))
    entries, rows, ranks = best_entries(scores, 3)
    assert entries.tolist() == [2, 3, 1, 4]
    assert rows.tolist() == [0, 0, 0, 2]
    assert ranks.tolist() == [0, 1, 2, 0]
    assert top_k(scores, 3)[0].tolist() == [[3, 0, 1], [0, 1, 2], [2, 0, 1]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_entries_of_each_number_format_are_ranked_by_their_values(dtype: type) -> None:
    scores = sparse.random_array((20, 40), density=0.5, rng=np.random.default_rng(0), format="csr", dtype=dtype)
    entries, rows, ranks = best_entries(scores, 4)
    expected = np.argsort(-scores.toarray(), axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(scores.indices[entries], expected[rows, ranks])
