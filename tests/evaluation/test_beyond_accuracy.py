"""Properties of ranked lists against plain loops over lists and pairs of items."""

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.evaluation.beyond_accuracy import BeyondAccuracy, ItemProperties

NUM_ITEMS, K, LISTS = 40, 20, 30


def catalog(rng: np.random.Generator, words: list[list[int]]) -> Catalog:
    counts_V = torch.from_numpy(rng.integers(0, 9, NUM_ITEMS))
    lengths_V = torch.tensor([len(ids) for ids in words])
    rows = Jagged.from_lengths(torch.tensor([word for ids in words for word in ids]), lengths_V)
    return Catalog(Path("items.parquet"), pa.array(range(NUM_ITEMS)), counts_V, {"word": rows})


def diversity(items: list[int], words: list[list[int]]) -> float | None:
    """1 - mean cosine of the pairs of a list."""
    vectors = []
    frequency = [sum(word in ids for ids in words) for word in range(12)]
    for item in items:
        vector = np.array([np.log(NUM_ITEMS / max(frequency[word], 1)) * (word in words[item]) for word in range(12)])
        if vector.any():
            vectors.append(vector / np.linalg.norm(vector))
    cosines = [first @ second for first, second in combinations(vectors, 2)]
    return 1 - float(np.mean(cosines)) if cosines else None


def test_all_properties_equal_plain_loops_at_any_batch_size() -> None:
    rng = np.random.default_rng(0)
    # Word 11 is in no text, and word 10 in all but those without words, whose weight is small but not 0.
    words = [[] if item % 7 == 0 else [*{*rng.integers(0, 10, 4).tolist(), 10}] for item in range(NUM_ITEMS)]
    items = catalog(rng, words)
    ids_BK = torch.from_numpy(np.stack([rng.permutation(30)[:K] for _ in range(LISTS)]))
    ids_BK[3, 4:] = -1
    ids_BK[4] = -1
    scores_BK = -torch.from_numpy(np.sort(rng.integers(0, 40, (LISTS, K)), axis=1)).float()
    targets_B = torch.from_numpy(rng.integers(0, NUM_ITEMS, LISTS))
    weights_B = torch.ones(LISTS)
    weights_B[-2:] = 0
    measured = BeyondAccuracy(ItemProperties(items))
    for part in (slice(0, 7), slice(7, 7), slice(7, LISTS)):
        measured.update(ids_BK[part], scores_BK[part], targets_B[part], weights_B[part])
    found = measured.compute()

    lists = [[item for item in row if item >= 0] for row in ids_BK[:-2].tolist()]
    places = [item for row in lists for item in row]
    counts = items.train_count_V.tolist()
    total = sum(counts) + NUM_ITEMS
    ties = [
        first == second
        for row, ids in zip(scores_BK[:-2].tolist(), lists, strict=True)
        for first, second in pairwise(row[: len(ids)])
    ]
    diversities = [value for row in lists if (value := diversity(row, words)) is not None]
    assert len(diversities) < len(lists)
    assert found == pytest.approx(
        {
            "coverage": len(set(places)) / NUM_ITEMS,
            "novelty": np.mean([-np.log2((counts[item] + 1) / total) for item in places]),
            "popularity_bias": np.mean([counts[item] for item in places])
            / np.mean([counts[item] for item in targets_B[:-2].tolist()]),
            "ties": np.mean(ties),
            "text_diversity": np.mean(diversities),
        }
    )


def test_without_lists_there_is_nothing_to_measure() -> None:
    items = ItemProperties(catalog(np.random.default_rng(0), [[1, 2]] * NUM_ITEMS))
    nothing = {"novelty": None, "popularity_bias": None, "ties": None, "text_diversity": None}
    assert BeyondAccuracy(items).compute() == {"coverage": 0.0} | nothing
