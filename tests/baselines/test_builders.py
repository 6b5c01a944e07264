"""Baselines by name: which there are, what may be blended, and what is refused."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from llmgr_rec.baselines.builders import (
    BASELINES,
    BLENDED,
    build_baseline,
    check_baselines,
    check_blended,
    training_matrix,
)
from llmgr_rec.baselines.knn import ItemNeighbors
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.errors import UserError
from llmgr_rec.training.neighbors import neighbor_scores
from tests.baselines.test_text_knn import kinds_log
from tests.small_run import NUM_ITEMS, ONE_RANK, small_run

CLICKS, OFFSETS = np.array([3, 5, 3, 9, 2]), np.array([0, 4, 5])


class OwnNeighbors(ItemNeighbors):
    """A baseline that may be blended."""

    def __init__(self, *_: Any) -> None:
        """Nothing."""


class OwnRanking:
    """A baseline that only ranks."""

    def rank(self, *_: Any) -> None:
        """Nothing."""


def no_baseline(*_: Any) -> int:
    return 3


@pytest.mark.parametrize("name", BASELINES)
def test_each_baseline_ranks_distinct_items(name: str) -> None:
    run = small_run()
    ids, scores = build_baseline(name, run.dataset, run.catalog).rank(CLICKS, OFFSETS, 7)
    assert ids.shape == scores.shape == (2, 7)
    for row in ids:
        assert len(set(row.tolist())) == 7
        assert set(row.tolist()) <= set(range(NUM_ITEMS))
    assert (np.diff(scores, axis=1) <= 0).all()


def test_fewer_neighbors_make_a_smaller_matrix() -> None:
    run = small_run()
    for name in BLENDED:
        sizes = []
        for count in (3, 20):
            baseline = build_baseline(name, run.dataset, run.catalog, count)
            assert isinstance(baseline, ItemNeighbors)
            sizes.append(baseline.similarity_VV.nnz)
        assert sizes[0] < sizes[1], name
        assert sizes[0] <= 3 * NUM_ITEMS


def test_the_training_matrix_has_the_clicks_of_the_training_split() -> None:
    run = small_run()
    matrix = training_matrix(run.dataset, NUM_ITEMS)
    assert matrix.shape[1] == NUM_ITEMS
    assert np.array_equal(np.asarray((matrix > 0).sum(axis=0)).ravel() > 0, run.catalog.train_count_V.numpy() > 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("popular", "popular.*popularity"),
        ("tests.baselines.test_builders:NoSuchClass", "NoSuchClass"),
        ("tests.baselines.test_builders:CLICKS", "cannot be called; give a function or class"),
        ("tests.baselines.test_builders:no_baseline", "made a int without a method rank; return a llmgr_rec"),
    ],
)
def test_what_is_no_baseline_is_refused(name: str, message: str) -> None:
    run = small_run()
    with pytest.raises(UserError, match=message):
        build_baseline(name, run.dataset, run.catalog)


def test_baselines_with_a_matrix_of_similarities_may_be_blended() -> None:
    check_blended([*BLENDED, "tests.baselines.test_builders:OwnNeighbors", "tests.baselines.test_builders:no_baseline"])
    for name in ("popularity", "session_knn", "tests.baselines.test_builders:OwnRanking"):
        with pytest.raises(UserError, match=f"blend.neighbors names {name}, which has no matrix of item similarities"):
            check_blended([name])


def test_without_item_texts_the_baseline_is_refused_and_the_blend_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = kinds_log(tmp_path, columns={"title": pa.nulls(40, pa.string())}).dataset
    catalog = Catalog.load(dataset.path)
    check_baselines(["popularity", "item_knn", "sbr"], catalog)
    with pytest.raises(UserError, match="text"):
        check_baselines(["text_knn"], catalog)
    with caplog.at_level(logging.WARNING):
        (neighbors,) = neighbor_scores(["text_knn"], 3, dataset, catalog, ONE_RANK)
    assert "text_knn adds nothing" in caplog.text
    assert neighbors.similarity_VR.shape == (catalog.num_items, catalog.num_items)
    assert not neighbors.similarity_VR.nnz
