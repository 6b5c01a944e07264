"""Similarities computed by several ranks are those of one process, to the bit; and files by range of items."""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from scipy import sparse

from llmgr_rec.baselines import item_similarity, text_knn
from llmgr_rec.baselines.blend import Blend
from llmgr_rec.baselines.blend_parts import load_parts, part_name, parts_of
from llmgr_rec.baselines.builders import BLENDED, build_baseline
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed import sharded_similarity
from llmgr_rec.distributed.item_vectors import items_of_rank
from llmgr_rec.distributed.process_group import World
from llmgr_rec.training.neighbors import neighbor_scores
from tests.ranks import run_on_ranks
from tests.small_run import NUM_ITEMS, ONE_RANK, small_run

# The last name is a baseline of the user.
NAMES = [*BLENDED, "llmgr_rec.baselines.builders:_item_knn"]
K = 5
# Fewer than those of some items' words.
ADDITIONS = 40


def similarities(world: World, dataset: Dataset, folder: Path | None) -> list[tuple[Any, ...]]:
    """The arrays of each baseline's similarities, computed in small blocks."""
    with (
        mock.patch.object(sharded_similarity, "_BLOCK_ROWS", 7),
        mock.patch.object(item_similarity, "_BLOCK_ADDITIONS", 5),
        mock.patch.object(text_knn, "_MAX_ADDITIONS", ADDITIONS),
    ):
        found = neighbor_scores(NAMES, K, dataset, Catalog.of(dataset), world, folder)
        read = neighbor_scores(NAMES, K, dataset, Catalog.of(dataset), world, folder)
    for one, other in zip(found, read, strict=True):
        np.testing.assert_array_equal(one.similarity_VR.toarray(), other.similarity_VR.toarray())
    assert all(blend.similarity_VR.shape[1] == len(items_of_rank(NUM_ITEMS, world)) for blend in found)
    return [
        (blend.similarity_VR.indptr, blend.similarity_VR.indices, blend.similarity_VR.data, blend.decay)
        for blend in found
    ]


@pytest.mark.dist
def test_ranks_compute_what_one_process_does_and_keep_it_for_any_number_of_ranks(tmp_path: Path) -> None:
    small, folder = small_run(), tmp_path / "neighbors"
    with mock.patch.object(text_knn, "_MAX_ADDITIONS", ADDITIONS):
        plain = [build_baseline(name, small.dataset, small.catalog, K) for name in NAMES]
    by_rank = run_on_ranks(similarities, 3, small.dataset, folder)
    assert len(list(folder.iterdir())) == 3 * len(NAMES)
    with mock.patch.object(sharded_similarity, "similarity_of_ranks", side_effect=AssertionError("computed again")):
        again = similarities(ONE_RANK, small.dataset, folder)
    for number, baseline in enumerate(plain):
        expected_VV = baseline.similarity_VV.astype(np.float32)  # type: ignore[attr-defined]
        for rank, found in enumerate(by_rank):
            items = items_of_rank(NUM_ITEMS, World(rank, 3, 3, ONE_RANK.device))
            same(found[number], expected_VV[:, items.start : items.stop])
        same(again[number], expected_VV)


def same(found: tuple[Any, ...], expected: sparse.csr_array) -> None:
    for array, part in zip(found, ("indptr", "indices", "data"), strict=False):
        np.testing.assert_array_equal(array, getattr(expected, part))


def test_common_words_of_a_large_catalog_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["red pen", "red ink", "red red pen", "blue tin", "tin"]
    everything = text_knn.TextKNN(texts).similarity_VV.toarray()
    assert everything[0, 1] > 0
    # red has three items, pen and tin have two each.
    monkeypatch.setattr(text_knn, "_MAX_ADDITIONS", 3)
    rare = text_knn.TextKNN(texts).similarity_VV.toarray()
    assert rare[0, 1] == 0
    assert rare[0, 2] > 0
    assert rare[3, 4] > 0


def test_files_by_items_are_read_by_other_ranges(tmp_path: Path) -> None:
    dense = np.random.default_rng(0).random((20, 20)).astype(np.float32) * (np.arange(20) % 3 > 0)
    whole = Blend({"item_knn": 2.0}, sparse.csr_array(dense), 0.7)
    for items in (range(8), range(8, 8), range(8, 15), range(15, 20)):
        whole.of_items(items).save(tmp_path / part_name("blend", items, 20))
    names = [file.name for file in tmp_path.iterdir()]
    parts = {items: tmp_path / name for items, name in parts_of("blend", names, 20).items()}
    assert list(parts) == [range(8), range(8, 15), range(15, 20)]
    for items in (range(20), range(3, 17), range(8, 15), range(4, 4), range(19, 20)):
        found = load_parts(parts, items)
        np.testing.assert_array_equal(found.similarity_VR.toarray(), dense[:, items.start : items.stop])
        assert (found.weights, found.decay) == (whole.weights, whole.decay)
    assert parts_of("blend", [*names, "blend.npz"], 20) == {range(20): "blend.npz"}
    assert not parts_of("blend", names[1:], 21)
    assert not parts_of("blend-0", names, 20)
