"""The blend: its scores, its parts and its file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from llmgr_rec.baselines import blend as blend_module
from llmgr_rec.baselines import stored_columns
from llmgr_rec.baselines.blend import Blend, clicks_of, combine
from llmgr_rec.baselines.knn import ItemNeighbors
from llmgr_rec.checksums import file_checksum
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.errors import UserError
from llmgr_rec.storage.bundle import load_bundle
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.storage.bundle_index import read_index
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.table_io import init_tables
from tests.json_files import edit_json
from tests.modules.small_llmgr import collator, raw_sessions
from tests.small_run import NUM_ITEMS, ONE_RANK, config, small_run

SESSIONS = [[3, 5, 3, 9], [], [2], [0, 1, 2, 3, 4, 5, 6]]


def blend(seed: int = 0, name: str = "item_knn", decay: float = 0.7) -> Blend:
    dense = np.random.default_rng(seed).random((NUM_ITEMS, NUM_ITEMS)).astype(np.float32)
    dense[dense < 0.8] = 0
    return Blend({name: 1.0}, sparse.csr_array(dense), decay)


def clicks() -> Jagged:
    values = torch.tensor([item for session in SESSIONS for item in session])
    return Jagged.from_lengths(values, torch.tensor([len(session) for session in SESSIONS]))


def test_scores_are_those_of_the_baseline() -> None:
    given = blend()
    baseline = ItemNeighbors(given.similarity_VR.astype(np.float64), given.decay)
    found = given.scores(clicks())
    assert found.dtype == np.float32
    expected = baseline.scores(clicks().values.numpy(), clicks().offsets.numpy()).toarray()
    assert expected[0].any()
    assert not expected[1].any()
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-6)


def test_parts_of_the_items_give_their_columns_to_the_bit() -> None:
    whole = blend().scores(clicks()).toarray()
    cuts = [range(17), range(17, 18), range(18, NUM_ITEMS)]
    parts = [blend().of_items(items).scores(clicks()).toarray() for items in cuts]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize("items", [range(NUM_ITEMS), range(7, 40), range(NUM_ITEMS - 1, NUM_ITEMS), range(5, 5)])
def test_columns_that_are_read_from_a_file_are_those_of_the_whole(
    tmp_path: Path, items: range, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_columns, "_BLOCK_ENTRIES", block)
    whole, file = combine([blend(), blend(1, "text_knn")], [1.0, 0.5]), tmp_path / "blend.npz"
    whole.save(file)
    read, sliced = Blend.load(file, items), whole.similarity_VR[:, items.start : items.stop]
    assert (read.weights, read.decay) == (whole.weights, whole.decay)
    assert read.similarity_VR.has_canonical_format == sliced.has_canonical_format
    for part in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(read.similarity_VR, part), getattr(sliced, part))
    damaged = bytearray(file.read_bytes())
    damaged[damaged.index(whole.similarity_VR.data.tobytes()) + 5] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"blend\.npz is damaged"):
        Blend.load(file, items)


def test_a_similarity_of_most_pairs_gives_the_same_scores_as_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as few:
        few.setattr(blend_module, "_MANY_ENTRIES", 1)
        assert isinstance(blend().terms_of_scores(clicks()), sparse.csr_array)
    for items in (range(NUM_ITEMS), range(3, 11)):
        given = blend().of_items(items)
        dense_terms = given.terms_of_scores(clicks())
        assert isinstance(dense_terms, torch.Tensor)
        np.testing.assert_allclose(dense_terms.numpy(), given.scores(clicks()).toarray(), rtol=1e-6)


def test_term_rows_add_up_to_the_scores() -> None:
    assert blend().term_rows(clicks().narrow(3, 4)) is None, "there are more terms than scores"
    terms = blend().term_rows(clicks())
    assert terms is not None
    ends = zip(terms.offsets_B1[:-1], terms.offsets_B1[1:], strict=True)
    sums = np.stack([terms.rows_LR[start:stop].sum(axis=0) for start, stop in ends])
    np.testing.assert_allclose(sums, blend().scores(clicks()).toarray(), rtol=1e-6)


@pytest.mark.parametrize("sessions", [SESSIONS, [[2, 2]], [[]]])
def test_few_entries_give_the_same_scores(sessions: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([item for session in sessions for item in session], dtype=torch.int64)
    given = Jagged.from_lengths(values, torch.tensor([len(session) for session in sessions]))
    found = []
    for few_entries in (0, NUM_ITEMS):
        monkeypatch.setattr(blend_module, "_FEW_ENTRIES", few_entries)
        scores = blend().scores(given)
        assert (scores.dtype, scores.shape) == (np.float32, (len(sessions), NUM_ITEMS))
        assert scores.nnz == len(set(zip(scores.nonzero()[0].tolist(), scores.nonzero()[1].tolist(), strict=True)))
        found.append(scores.toarray())
    np.testing.assert_array_equal(*found)
    for number, session in enumerate(sessions):
        neighbors, terms = blend().scores_of_session(np.array(session, np.int64))
        assert (np.diff(neighbors) > 0).all()
        assert (neighbors.dtype, terms.dtype) == (np.int64, np.float32)
        np.testing.assert_array_equal(neighbors, found[0][number].nonzero()[0])
        np.testing.assert_allclose(terms, found[0][number][neighbors], rtol=1e-6)


def test_several_add_up_by_their_weights() -> None:
    both = combine([blend(0, "item_knn"), blend(1, "text_knn")], [2.0, 0.5])
    assert both.weights == {"item_knn": 2.0, "text_knn": 0.5}
    expected = 2 * blend(0).scores(clicks()).toarray() + blend(1).scores(clicks()).toarray() / 2
    np.testing.assert_allclose(both.scores(clicks()).toarray(), expected, rtol=1e-6)
    assert both.similarity_VR.dtype == np.float32
    nothing = combine([blend()], [0.0])
    assert nothing.weights == {"item_knn": 0.0}
    assert not nothing.scores(clicks()).toarray().any()
    with pytest.raises(UserError, match=r"item_knn \(0\.7\), item_knn \(0\.5\) cannot be blended"):
        combine([blend(), blend(decay=0.5)], [1.0, 1.0])


def test_what_the_clicks_add_is_the_score() -> None:
    given, items = combine([blend(0, "item_knn"), blend(1, "text_knn")], [2.0, 0.5]), np.array([30, 4, 4, 59])
    expected = given.scores(clicks()).toarray()[:, items]
    assert [dict(term.weights) for term in given.terms] == [{"item_knn": 2.0}, {"text_knn": 0.5}]
    for session, scores in zip(SESSIONS, expected, strict=True):
        indices = np.array(session, np.int64)
        parts = [term.click_scores(indices, items)[1] for term in given.terms]
        np.testing.assert_allclose(sum(part.sum(axis=0) for part in parts), scores, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(sum(parts), given.click_scores(indices, items)[1], rtol=1e-5, atol=1e-7)
    # A weight of 0 makes no part, and a single one is the blend itself.
    assert combine([blend(0, "item_knn"), blend(1, "text_knn")], [2.0, 0.0]).terms == ()


def test_clicks_of_a_batch_are_in_order() -> None:
    batch = collator()(raw_sessions(SESSIONS, [1, 1, 1, 1]))
    assert torch.equal(clicks_of(batch).values, clicks().values)
    assert torch.equal(clicks_of(batch).offsets, clicks().offsets)


def same(one: Blend, other: Blend) -> bool:
    return (
        one.weights == other.weights
        and one.decay == other.decay
        and one.similarity_VR.dtype == other.similarity_VR.dtype
        and not (one.similarity_VR != other.similarity_VR).nnz
    )


def export(folder: Path, given: Blend | None) -> Path:
    catalog = Catalog.load(small_run().dataset.path)
    factory = ModelFactory()
    model = factory.build(factory.spec("sbr", config(), catalog), None, "cpu")
    init_tables(model, 1, 0.5)
    export_bundle(model, "sbr", config(), catalog, folder / "sbr", ONE_RANK, blend=given)
    return folder / "sbr"


def test_a_bundle_holds_its_blend(tmp_path: Path) -> None:
    given = combine([blend(0, "item_knn"), blend(1, "text_knn")], [2.0, 0.5])
    bundles = [export(tmp_path / str(number), given) for number in range(2)]
    loaded = load_bundle(bundles[0]).blend
    assert loaded is not None
    assert same(loaded, given)
    np.testing.assert_array_equal(loaded.scores(clicks()).toarray(), given.scores(clicks()).toarray())
    assert (bundles[0] / "blend.npz").read_bytes() == (bundles[1] / "blend.npz").read_bytes()
    assert read_index(bundles[0]).files["blend.npz"] == (bundles[0] / "blend.npz").stat().st_size


def test_a_bundle_without_one_has_no_file(tmp_path: Path) -> None:
    bundle = export(tmp_path, None)
    assert not (bundle / "blend.npz").exists()
    assert load_bundle(bundle).blend is None


@pytest.mark.parametrize("damage", ["cut", "turned", "foreign", "other"])
def test_a_damaged_blend_is_refused(tmp_path: Path, damage: str) -> None:
    bundle = export(tmp_path, blend())
    file = bundle / "blend.npz"
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-100])
    elif damage == "turned":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "foreign":
        file.write_bytes(bytes(len(content)))
    else:
        file.unlink()
        smaller = sparse.csr_array((NUM_ITEMS - 1, NUM_ITEMS - 1), dtype=np.float32)
        Blend({"item_knn": 1.0}, smaller, 0.7).save(file)

        def foreign(index: dict[str, Any]) -> None:
            index["files"]["blend.npz"] = file.stat().st_size
            index["checksums"]["blend.npz"] = file_checksum(file)

        edit_json(bundle / "bundle.json", foreign)
    with pytest.raises(UserError, match=r"blend\.npz") as caught:
        load_bundle(bundle)
    assert "damaged" in str(caught.value)


def test_a_file_that_zipfile_cannot_read_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "blend.npz"
    blend().save(file)
    content = bytearray(file.read_bytes())
    # Flag of the first entry in the directory of the archive: a compressed patch.
    content[content.index(b"PK\x01\x02") + 8] |= 1 << 5
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{file} is damaged \(compressed patched data"):
        Blend.load(file)
