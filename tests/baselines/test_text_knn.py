"""Text-kNN against plain loops, within its memory, and on items that no training session holds."""

import logging
import math
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmgr_rec.baselines import item_similarity
from llmgr_rec.baselines.builders import build_baseline, check_baselines
from llmgr_rec.baselines.knn import ItemKNN
from llmgr_rec.baselines.text_knn import TextKNN, texts_to_compare
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.errors import UserError
from llmgr_rec.kernels import sparse_product
from tests.baselines.catalogs import CATALOGS
from tests.baselines.test_knn import flat, sessions_of
from tests.data.prepare_inputs import Prepared, edit_manifest, prepare, write_items

NUM_ITEMS = 15
text_of = st.lists(st.sampled_from(["Red", "red", "soap", "for", "hair", "x"]), max_size=6).map(", ".join)
texts_of = st.lists(text_of, min_size=NUM_ITEMS, max_size=NUM_ITEMS)


def cosine(texts: list[str], one: int, other: int) -> float:
    """Straight from the definition."""
    bags = [set(text.lower().replace(",", " ").split()) for text in texts]
    weight = {word: math.log(len(texts) / sum(word in bag for bag in bags)) for bag in bags for word in bag}
    length = [math.sqrt(sum(weight[word] ** 2 for word in bag)) for bag in bags]
    if one == other or not length[one] or not length[other]:
        return 0.0
    return sum(weight[word] ** 2 for word in bags[one] & bags[other]) / (length[one] * length[other])


@given(texts_of, sessions_of, st.integers(1, NUM_ITEMS))
@settings(max_examples=40, deadline=None)
def test_text_knn_equals_the_reference(texts, queries, k):
    knn = TextKNN(texts, decay=0.7)
    scores_BV = knn.scores(*flat(queries)).toarray()
    ids, scores = knn.rank(*flat(queries), k)
    near = np.array([[cosine(texts, one, other) for other in range(NUM_ITEMS)] for one in range(NUM_ITEMS)])
    for number, session in enumerate(queries):
        expected = sum(0.7 ** (len(session) - 1 - place) * near[item] for place, item in enumerate(session))
        np.testing.assert_allclose(scores_BV[number], expected, atol=1e-11)
        np.testing.assert_allclose(scores[number], np.sort(expected)[::-1][:k], atol=1e-11)
        np.testing.assert_allclose(scores[number], expected[ids[number]], atol=1e-11)
        assert len(set(ids[number].tolist())) == k


@given(texts_of, st.integers(1, 6), st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_the_nearest_neighbors_are_kept_whatever_the_blocks(texts, neighbors, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item_similarity, "_BLOCK_ADDITIONS", block)
        kept = TextKNN(texts, k_neighbors=neighbors).similarity_VV.toarray()
    for item in range(NUM_ITEMS):
        near = np.round([cosine(texts, item, other) for other in range(NUM_ITEMS)], 12)
        best = np.argsort(-near, kind="stable")[:neighbors]
        assert np.flatnonzero(kept[item]).tolist() == sorted(best[near[best] > 0])
        np.testing.assert_allclose(kept[item, best], near[best], atol=1e-11)


def test_similarities_are_held_a_block_at_a_time(monkeypatch):
    held = []
    nearest = item_similarity.nearest
    monkeypatch.setattr(item_similarity, "_BLOCK_ADDITIONS", 1000)
    monkeypatch.setattr(sparse_product, "_COLUMNS_PER_ADDITION", 0)
    monkeypatch.setattr(item_similarity, "nearest", lambda near_UV, n: held.append(near_UV.nnz) or nearest(near_UV, n))
    kept = TextKNN([f"tin {number}" for number in range(300)] + ["lid"], k_neighbors=7).similarity_VV
    # 300 items with a word in common are 89,700 pairs.
    assert 89_700 == sum(held) > 89 * max(held)
    assert max(held) <= 1000
    assert np.diff(kept.indptr).tolist() == [7] * 300 + [0]


def test_repeated_words_and_words_of_every_text_change_nothing():
    texts = ["red soap", "blue soap", "red tin", "blue lid"]
    other = ["all Red soap red", "all blue soap", "all red tin tin tin", "all blue lid"]
    np.testing.assert_allclose(TextKNN(texts).similarity_VV.toarray(), TextKNN(other).similarity_VV.toarray())


@pytest.mark.parametrize("language", CATALOGS)
def test_neighbors_of_every_language_are_those_of_the_english_titles(language: str) -> None:
    for forms in (("NFC", "NFC"), ("NFC", "NFD"), ("NFKD", "NFC")):
        titles = [unicodedata.normalize(forms[place % 2], title) for place, title in enumerate(CATALOGS[language])]
        nearest = TextKNN(titles).similarity_VV.toarray().argmax(1)
        assert nearest.tolist() == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8]


KINDS = ("amber soap", "velvet tea", "marble lamp", "copper ink")


def kinds_log(folder: Path, **settings) -> Prepared:
    """40 items of 4 kinds, whose titles say the kind; each user keeps to one kind."""
    ids = [f"i{number}" for number in range(40)]
    rng = np.random.default_rng(0)
    clicks = [
        (f"u{user}", f"i{4 * int(number) + user % 4}", place)
        for user in range(60)
        for place, number in enumerate(rng.permutation(10)[:7])
    ]
    titles = [f"{KINDS[number % 4]} no {number}" for number in range(40)]
    items = write_items(folder / "items.parquet", ids, **({"title": titles} | settings.pop("columns", {})))
    return prepare(folder, clicks, items=str(items), keep_unseen_items=True, **settings)


def test_an_unseen_item_with_a_text_like_the_clicked_ones_is_ranked_first(tmp_path):
    # One title has all the words of the clicked ones, and is of an item that training never saw.
    titles = [f"{KINDS[number % 4]} no {number}" for number in range(40)]
    unseen = [item["index"] for item in kinds_log(tmp_path, hold_out_items=0.2).items if not item["train_count"]]
    assert len(unseen) > 3
    catalog = Catalog.load(tmp_path / "dataset")
    for item in unseen:
        seen = [other for other in range(item % 4, 40, 4) if other not in unseen][:3]
        texts = texts_to_compare(catalog)
        texts[item] = " ".join(titles[other] for other in seen)
        ids, _ = TextKNN(texts).rank(*flat([seen]), 3)
        assert ids[0, 0] == item


def test_text_finds_held_out_targets_where_co_occurrence_cannot(tmp_path):
    dataset = kinds_log(tmp_path, hold_out_items=0.2).dataset
    catalog = Catalog.load(dataset.path)
    text, item = (build_baseline(name, dataset, catalog) for name in ("text_knn", "item_knn"))
    assert isinstance(text, TextKNN)
    assert isinstance(item, ItemKNN)
    unseen = np.flatnonzero(catalog.train_count_V.numpy() == 0)
    for target in unseen:
        session = flat([[other for other in range(target % 4, 40, 4) if other not in unseen]])
        assert item.scores(*session).toarray()[0, target] == 0
        assert target in text.rank(*session, 9)[0]


def test_a_data_set_without_text_is_refused(tmp_path):
    titles = {"title": pa.nulls(40, pa.string()), "description": ["described"] * 40}
    dataset = kinds_log(tmp_path, columns=titles).dataset
    catalog = Catalog.load(dataset.path)
    message = r"items\.parquet: no item has a word in title, category, brand, by which text_knn ranks; prepare"
    with pytest.raises(UserError, match=message):
        build_baseline("text_knn", dataset, catalog)
    with pytest.raises(UserError, match=message):
        check_baselines(["sbr", "text_knn"], catalog)
    check_baselines(["sbr", "item_knn"], catalog)


def test_items_without_text_score_0_beside_items_with_a_brand_alone(tmp_path):
    brands = {"title": pa.nulls(40, pa.string()), "brand": ["A", "B", None, "A"] * 10}
    dataset = kinds_log(tmp_path, columns=brands).dataset
    scores = build_baseline("text_knn", dataset, Catalog.load(dataset.path)).scores(*flat([[0], [2]])).toarray()
    assert np.flatnonzero(scores[0]).tolist() == [item for item in range(1, 40) if item % 4 in (0, 3)]
    assert not scores[1].any()


def test_a_data_set_of_another_word_rule_is_reported_where_its_words_differ(tmp_path, caplog):
    titles = [f"{KINDS[number % 4]} no {number}" for number in range(40)]
    for place, (changed, warned) in enumerate([("किताब", True), ("book", False)]):
        dataset = kinds_log(
            tmp_path, output=str(tmp_path / str(place)), columns={"title": [changed, *titles[1:]]}
        ).dataset
        edit_manifest(dataset.path, lambda values: values.pop("word_rule"))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "llmgr_rec.baselines.builders"):
            build_baseline("text_knn", Dataset(dataset.path), Catalog.load(dataset.path))
        assert ("Prepare it again" in caplog.text) == warned
