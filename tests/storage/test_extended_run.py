"""A trained run for another catalog, without training."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from scipy import sparse

from llmgr_rec import Recommender
from llmgr_rec.baselines.blend import Blend, combine
from llmgr_rec.baselines.embedding_knn import EmbeddingKNN
from llmgr_rec.baselines.text_knn import TEXT_FIELDS, TextKNN
from llmgr_rec.config import StageName
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.errors import UserError
from llmgr_rec.extend import main as extend
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.text_table import ITEM_TEXT
from llmgr_rec.storage.bundle import load_blend_terms, load_bundle, open_bundle
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.storage.bundle_index import check_trained_on
from llmgr_rec.storage.embedding_model import EmbeddingModel
from llmgr_rec.storage.extended_run import _without_clicks, extend_run
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.table_io import init_tables, local_shards
from llmgr_rec.training.text_embeddings import embed_catalog, fill_text_table, refresh_item_vectors
from tests.documented import ROOT
from tests.small_run import NUM_ITEMS, ONE_RANK, config, small_run

SESSIONS = [["i11", "i13"], ["i17"], ["i20", "i22", "i25"]]


def items_of(ids: list[Any], **texts: list[Any]) -> pa.Table:
    return pa.table({"item_id": ids, **texts})


def known() -> list[str]:
    return small_run().catalog.item_ids.to_pylist()


def scores(run: Path, sessions: list[list[str]] = SESSIONS) -> list[dict[Any, float]]:
    """The score of every item that may be recommended, by session."""
    ranked = Recommender.load(run).recommend(sessions, k=2 * NUM_ITEMS).to_pylist()
    return [dict(zip(row["item_ids"], row["scores"], strict=True)) for row in ranked]


def sbr() -> Path:
    """A bundle of stage sbr alone."""
    return small_run().run / "export/sbr"


def extended(folder: Path, ids: list[Any], run: Path | None = None, **texts: list[Any]) -> Path:
    extend_run(run or sbr(), items_of(ids, **texts), "items", folder)
    return folder


def test_the_same_items_give_the_same_model_and_another_order_the_same_scores(tmp_path: Path) -> None:
    run = small_run().run
    before = {path: path.lstat().st_mtime_ns for path in [run, *run.rglob("*")]}
    same, reversed_ = extended(tmp_path / "same", known(), run), extended(tmp_path / "reversed", known()[::-1])
    for stage in ("sbr", "behave"):
        source = run / "export" / stage
        for name in (
            "recommender.safetensors",
            *(f"tables/{table}-r0-c0.safetensors" for table in ("item_id", "category")),
        ):
            assert (same / "export" / stage / name).read_bytes() == (source / name).read_bytes()
        assert scores(same / "export" / stage) == scores(source)
    for one, other in zip(scores(reversed_), scores(sbr()), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert before == {path: path.lstat().st_mtime_ns for path in [run, *run.rglob("*")]}


def test_new_items_are_ranked_by_their_texts_and_gone_items_never(tmp_path: Path) -> None:
    gone = ["i3", "i40"]
    ids = ["n1", "n2", "n3", *(item for item in known()[::-1] if item not in gone)]
    titles = ["Thing i17", "Nothing Else", None, *[None] * (NUM_ITEMS - 2)]
    categories = ["Kind 1", "Kind 2", "Kind 9", *[None] * (NUM_ITEMS - 2)]
    run = extended(tmp_path / "new", ids, title=titles, category=categories)
    for one, other in zip(scores(run), scores(sbr()), strict=True):
        assert one.keys() == set(ids)
        kept = one.keys() & other.keys()
        assert {item: one[item] for item in kept} == pytest.approx({item: other[item] for item in kept}, abs=1e-5)
    catalog, rec = Catalog.load(run / "export" / "sbr"), Recommender.load(run)
    assert catalog.titles()[:4] == [*titles[:2], None, f"<b>Thing</b> & {ids[3]}"]
    assert catalog.train_count_V[:3].tolist() == [0, 0, 0]
    # Most similar by words is i17 itself.
    assert rec.similar(["n1"], k=3).to_pylist()[0]["item_ids"][0] == "i17"
    assert rec.recommend([["n1"]], k=3).to_pylist()[0]["fallback"] is False
    # A value that the run does not know has no row.
    assert catalog.features["category"].lengths[:3].tolist() == [1, 1, 0]


def test_a_new_item_is_the_weighted_mean_of_similar_items_or_of_all(tmp_path: Path) -> None:
    run = extended(tmp_path / "new", [*known(), "n1", "n2"], title=[None] * NUM_ITEMS + ["i17 i18", "unheard"])
    rows = load_file(run / "export/sbr/tables/item_id-r0-c0.safetensors")["weight"]
    place = {item: row for row, item in enumerate(known())}
    trained = small_run().catalog.train_count_V > 0
    assert trained[[place["i17"], place["i18"]]].all()
    mean = (rows[place["i17"]] + rows[place["i18"]]) / 2
    torch.testing.assert_close(rows[NUM_ITEMS], mean)
    torch.testing.assert_close(rows[NUM_ITEMS + 1], rows[:NUM_ITEMS][trained].mean(dim=0))


def test_an_extended_run_is_extended_again_and_items_that_come_back_are_new(tmp_path: Path) -> None:
    first = extended(tmp_path / "first", [*known()[1:], "n1"], title=[None] * (NUM_ITEMS - 1) + ["Thing i17"])
    # Texts that are left out are those of the run.
    second = extended(tmp_path / "second", ["n1", *known()], first, title=[None, "Thing i0", *[None] * (NUM_ITEMS - 1)])
    one, two = scores(first), scores(second)
    for before, after in zip(one, two, strict=True):
        assert {item: after[item] for item in before} == pytest.approx(before, abs=1e-5)
    assert Catalog.load(second / "export/sbr").train_count_V[1] == 0


def test_all_items_may_be_new(tmp_path: Path) -> None:
    run = extended(tmp_path / "new", ["a", "b"], title=["Thing i17", "Thing i18"], category=["Kind 1", "Kind 2"])
    assert [set(row) for row in scores(run, [["a"], ["i17"]])] == [{"a", "b"}] * 2
    back = extend_run(run, items_of(["c"], title=["Thing i18 a"]), "items", tmp_path / "back")
    assert (back.num_new, back.num_gone, back.neighbors_NK[0, 0]) == (1, 2, 1)
    assert back.summary().endswith("gone; no item has the id of an item of the run, check that both are written alike")


def test_ids_may_be_of_another_type(tmp_path: Path) -> None:
    small = small_run()
    folder = tmp_path / "numbers"
    folder.mkdir()
    table = pq.read_table(small.dataset.path / "items.parquet")
    numbers = pa.array([int(item.removeprefix("i")) for item in table["item_id"].to_pylist()])
    pq.write_table(table.set_column(1, "item_id", numbers), folder / "items.parquet")
    bundle = load_bundle(small.run / "export/sbr")
    export_bundle(bundle.model, "sbr", config(), Catalog.load(folder), folder / "run/export/sbr", ONE_RANK)
    run, ids = folder / "run", [*numbers.to_pylist()[5:], 77]
    for given, name in ((list(map(str, ids)), "text"), (list(map(float, ids)), "floats")):
        mapping = extend_run(run, items_of(given, title=[None] * (NUM_ITEMS - 5) + ["i17"]), "items", tmp_path / name)
        assert (mapping.num_new, mapping.num_gone) == (1, 5)
        assert Recommender.load(tmp_path / name).item_ids.to_pylist() == ids
    with pytest.raises(UserError, match=r"items: item_id 'x7' is not an integer, but those of the run are"):
        extend_run(run, items_of(["x7"]), "items", tmp_path / "x")


def language_run(folder: Path, stage: StageName, head: str = "tied") -> Path:
    """A run of an untrained model with a language model, whose table of text embeddings has those of the texts."""
    small, settings, factory = small_run(), config(), ModelFactory()
    settings.head.name, settings.head.item_text = head, True
    settings.text_encoder.dim = 16
    spec = factory.spec(stage, settings, small.catalog)
    language = factory.language_parts(spec, small.catalog, torch.device("cpu"))
    assert language
    tokens = factory.item_tokens(settings, small.catalog)
    texts = embed_catalog(language.decoder, tokens, ONE_RANK, folder / "texts", "") if spec.head_has_text else None
    model = factory.build(spec, language, "cpu")
    init_tables(model, 1, 0.5)
    if texts:
        fill_text_table(model, texts.read)
    refresh_item_vectors(model.eval(), ONE_RANK)
    export_bundle(model, stage, settings, small.catalog, folder / "export" / stage, ONE_RANK)
    return folder


@pytest.mark.parametrize(("stage", "head"), [("behave", "tied"), ("behave", "linear"), ("llm_text", "tied")])
def test_what_a_language_model_knows_of_an_item_follows_it(tmp_path: Path, stage: StageName, head: str) -> None:
    run = language_run(tmp_path / "run", stage, head)
    ids = ["twin", *known()[::-1]]
    titles, categories = (small_run().catalog.column(name).to_pylist() for name in ("title", "category"))
    place, twin = known().index("i17"), [None] * NUM_ITEMS
    new = extended(tmp_path / "new", ids, run, title=[titles[place], *twin], category=[categories[place], *twin])
    before, after = (load_bundle(one).model for one in (run, new))
    # Of the same text, and so of the same text embedding.
    rows = [NUM_ITEMS - place, *range(1, NUM_ITEMS + 1)]
    for one, other in zip(local_shards(before), local_shards(after), strict=True):
        if one.table == ITEM_TEXT:
            torch.testing.assert_close(other.tensor[1:].flip(0), one.tensor, atol=1e-6, rtol=0)
            torch.testing.assert_close(other.tensor[0], other.tensor[rows[0]], atol=1e-4, rtol=0)
    if head == "linear":
        assert isinstance(before, LLMGR)
        assert isinstance(after, LLMGR)
        assert torch.equal(after.head.get_parameter("weight_VH")[1:].flip(0), before.head.get_parameter("weight_VH"))
    one, other = scores(run), scores(new)
    for first, second in zip(one, other, strict=True):
        assert {item: second[item] for item in first} == pytest.approx(first, abs=1e-4)


def blended(folder: Path) -> Path:
    """A run of stage sbr with a blend of item-kNN, text-kNN and embedding-kNN."""
    small, rng = small_run(), np.random.default_rng(0)
    settings = config()
    settings.blend.neighbors, settings.blend.embedding_model = ["item_knn", "text_knn"], "random-tiny"
    texts = small.catalog.texts(list(TEXT_FIELDS))
    clicks = sparse.csr_array(rng.random((NUM_ITEMS, NUM_ITEMS)) * (rng.random((NUM_ITEMS, NUM_ITEMS)) < 0.2))
    parts = {
        "item_knn": clicks.astype(np.float32),
        "text_knn": TextKNN(texts, k_neighbors=settings.blend.k_neighbors).similarity_VV.astype(np.float32),
        "embedding_knn": EmbeddingKNN(
            EmbeddingModel("random-tiny").embeddings(small.catalog), k_neighbors=settings.blend.k_neighbors
        ).similarity_VV.astype(np.float32),
    }
    blend = combine([Blend({name: 1.0}, sparse.csr_array(part), 0.7) for name, part in parts.items()], [2.0, 4.0, 1.0])
    model = load_bundle(small.run / "export/sbr").model
    export_bundle(model, "sbr", settings, small.catalog, folder / "export/sbr", ONE_RANK, blend=blend)
    return folder


def test_the_blend_follows_the_items_and_its_neighbors_by_text_know_the_new_ones(tmp_path: Path) -> None:
    run = blended(tmp_path / "run")
    same = extended(tmp_path / "same", known(), run)
    assert (same / "export/sbr/blend.npz").read_bytes() == (run / "export/sbr/blend.npz").read_bytes()
    ids = ["n1", *known()[:0:-1]]
    new = extended(tmp_path / "new", ids, run, title=["Thing i17", *[None] * (NUM_ITEMS - 1)])
    before, after = (load_blend_terms(open_bundle(one)) for one in (run, new))
    place = [known().index(item) for item in ids[1:]]
    clicks = after[0].similarity_VR.toarray()
    np.testing.assert_array_equal(clicks[1:, 1:], before[0].similarity_VR.toarray()[np.ix_(place, place)])
    assert not clicks[0].any()
    assert not clicks[:, 0].any()
    assert after[1].similarity_VR.toarray()[0].argmax() == ids.index("i17")
    assert after[1].weights == {"text_knn": 4.0}
    assert after[2].similarity_VR.toarray()[0].any()
    explanation = Recommender.load(new).explain(["i17"], items=["n1"])
    assert {"text_knn", "embedding_knn"} <= {part["name"] for part in explanation.to_dict()["items"][0]["parts"]}


def test_text_neighbors_decide_where_nobody_has_clicked(tmp_path: Path) -> None:
    run, titles = blended(tmp_path / "run"), ["Thing i17", "Thing i17 a", "a b", "Thing b"]
    new = extended(tmp_path / "new", list("abcd"), run, title=titles)
    mixed = extended(tmp_path / "mixed", [*"abcd", "i17"], run, title=[*titles, "i17 c"])
    for path, number, factor in ((new, 4, 128 / 5), (mixed, 5, 1)):
        files = open_bundle(path)
        (_, by_words, by_embeddings), texts = load_blend_terms(files), files.catalog.texts(list(TEXT_FIELDS), False)
        expected = 4 * factor * TextKNN(texts, k_neighbors=files.config.blend.k_neighbors).similarity_VV.toarray()
        np.testing.assert_allclose(by_words.similarity_VR.toarray(), expected, rtol=1e-5)
        assert by_embeddings.similarity_VR.shape == (number, number)
    # In the order of the similarities to each of the clicks, most similar first.
    expected = load_blend_terms(open_bundle(new))[1].similarity_VR.toarray()[0].argsort()[::-1]
    assert Recommender.load(new).recommend([["a"]], k=4).to_pylist()[0]["item_ids"][0] == "abcd"[expected[0]]


def test_a_domain_without_clicks_is_told_from_one_with_some(tmp_path: Path) -> None:
    columns = {"index": [0, 1, 2, 3], "item_id": ["a:1", "b:1", "a:2", "b:2"], "train_count": [0, 0, 3, 0]}
    none: pa.Array = pa.array([[]] * 4, pa.list_(pa.int64()))
    features = {"category_ids": none, "brand_ids": none, "word_ids": none, "domain": ["a", "b", "a", "b"]}
    pq.write_table(pa.table({**columns, **features}), tmp_path / "items.parquet")
    assert _without_clicks(Catalog.load(tmp_path)).tolist() == [False, True, False, True]


_KILLED = """
import os, signal, sys
from llmgr_rec.storage import extended_run
done = []
def export(*arguments):
    if done:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(real(*arguments))
real, extended_run.export_bundle = extended_run.export_bundle, export
from llmgr_rec.extend import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_command_leaves_nothing_that_is_taken_for_a_run(tmp_path: Path) -> None:
    output = tmp_path / "out" / "new"
    pq.write_table(items_of(known()), tmp_path / "items.parquet")
    words = ["--run", str(small_run().run), "--items", str(tmp_path / "items.parquet"), "--output", str(output)]
    killed = subprocess.run([sys.executable, "-c", _KILLED, *words], capture_output=True, timeout=120, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    assert list(output.parent.iterdir())
    extend(words)
    assert [path.name for path in output.parent.iterdir()] == ["new"]
    assert {path.name for path in (output / "export").iterdir()} == {"sbr", "behave"}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"id": ["a"]}, "items has no column item_id"),
        ({"item_id": []}, "items has no items; give the whole current catalog"),
        ({"item_id": ["a", None]}, "items: column item_id has 1 nulls; give every item an id"),
        (
            {"item_id": ["i1", "a", "a"]},
            r"items: item_id 'a' occurs more than once \(1 ids do\); keep one row per item",
        ),
        ({"item_id": [True]}, "items: column item_id is bool, but must be text or integers"),
        ({"item_id": ["a"], "title": [["x"]]}, "items: column title is list<.*>, but must be text"),
        ({"item_id": ["a"]}, "items: 1 items have no text in title, category, the first is item_id 'a'; stage behave"),
    ],
)
def test_unusable_items_are_refused_in_one_line(tmp_path: Path, items: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        extend_run(small_run().run, pa.table(items), "items", tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_data_set_of_the_same_catalog_evaluates_an_extended_run(tmp_path: Path) -> None:
    dataset = small_run().dataset
    extend_run(sbr(), pq.read_table(dataset.items_path), "items", tmp_path / "new")
    check_trained_on(tmp_path / "new/export/sbr", dataset)


def test_a_run_with_controls_is_refused(tmp_path: Path) -> None:
    class Controlled(ModelFactory):
        name = "shuffled"

    model = load_bundle(sbr()).model
    folder = tmp_path / "run/export/sbr"
    export_bundle(model, "sbr", config(), small_run().catalog, folder, ONE_RANK, factory=Controlled())
    with pytest.raises(UserError, match="was made by an experiment with controls shuffled; train a run without"):
        extend_run(tmp_path / "run", items_of(known()), "items", tmp_path / "new")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent", "does not exist; give a run folder"),
        (lambda folder: folder.joinpath("model.pt2"), "is a file; give a run folder"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    (tmp_path / "model.pt2").write_bytes(b"program")
    with pytest.raises(UserError, match=message):
        extend_run(make(tmp_path), items_of(known()), "items", tmp_path / "new")


def test_the_command_counts_the_items_and_refuses_a_second_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(items_of([*known()[2:], "n1"], title=[None] * (NUM_ITEMS - 2) + ["i17"]), tmp_path / "items.parquet")
    words = [
        "--run",
        str(small_run().run),
        "--items",
        str(tmp_path / "items.parquet"),
        "--output",
        str(tmp_path / "new"),
    ]
    extend(words)
    assert capsys.readouterr().out == (
        f"extend: 58 items known, 1 new (1 of them with similar texts), 2 gone; wrote {tmp_path / 'new'}\n"
    )
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"config.yaml", "export"}
    with pytest.raises(UserError, match=r"new is not empty; give a folder that does not exist"):
        extend(words)
