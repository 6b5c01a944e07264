"""Node vectors before and after hybrid encoding, of a small untrained run."""

import json
import sys

import pytest
import torch

from benchmarks import hybrid_encoding
from benchmarks.hybrid_encoding import ENCODED, PROJECTED, RANDOM, SHUFFLED, VARIANTS
from benchmarks.similarity import shared_neighbors
from llmgr_rec.cli import run_cli
from llmgr_rec.config import Config
from llmgr_rec.errors import UserError
from llmgr_rec.storage.bundle import Bundle, load_bundle
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.table_io import init_tables
from tests.small_run import config, run_with, small_run

PROMPTS = """\
behave: "Next? {nodes} {graph} ="
align: "Which? {text} {nodes} ="
structure_graph: "G {graph} ="
structure_nodes: "N {nodes} ="
"""


def bundle_of(settings: Config) -> Bundle:
    catalog = small_run().catalog
    factory, cpu = ModelFactory(), torch.device("cpu")
    spec = factory.spec("behave", settings, catalog)
    model = factory.build(spec, factory.language_parts(spec, catalog, cpu), cpu)
    init_tables(model, 1, 0.5)
    return Bundle(small_run().run, spec, model.eval(), catalog, factory.collator(spec, catalog, "rank"))


def items_of(bundle: Bundle) -> torch.Tensor:
    return torch.nonzero(bundle.catalog.train_count_V > 0).flatten()


def test_each_exported_stage_has_its_table_report_and_plot(tmp_path, capsys):
    run = run_with(tmp_path / "run", "sbr", "behave")
    output = tmp_path / "out.json"
    words = ["--run", str(run), "--items", "40", "--neighbors", "5,10", "--threads", "1", "--output", str(output)]
    hybrid_encoding.main(words)
    results = json.loads(output.read_text())["results"]
    assert list(results) == ["behave"]
    assert results["behave"]["items"] == 40
    variants = results["behave"]["variants"]
    assert list(variants) == list(VARIANTS)
    for values in variants.values():
        assert list(values) == ["cka", "overlap@5", "overlap@10"]
        assert all(-1 <= cell["low"] <= cell["high"] <= 1 for cell in values.values())
    # Nothing was trained: the projection keeps as much as a random one, and far more than chance.
    assert variants[PROJECTED]["overlap@5"]["mean"] == pytest.approx(variants[RANDOM]["overlap@5"]["mean"], abs=0.15)
    assert variants[PROJECTED]["overlap@5"]["low"] > 2 * variants[SHUFFLED]["overlap@5"]["high"]
    assert variants[PROJECTED]["cka"]["low"] > variants[SHUFFLED]["cka"]["high"]
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("stage behave, 40 items", *VARIANTS))
    assert "<svg" in output.with_suffix(".svg").read_text()


@pytest.mark.parametrize("source", ["table", "encoder"])
def test_vectors_before_and_after_are_of_the_same_items_in_order(source):
    settings = config()
    settings.prompt.node_source = source
    bundle = bundle_of(settings)
    items_N = items_of(bundle)
    vectors = hybrid_encoding.encode(bundle, items_N, seed=0)
    for row in (0, 7, len(items_N) - 1):
        output = bundle.model.look_up(bundle.collate(hybrid_encoding.single_clicks(items_N[row : row + 1])))
        expected_D = (output.rows_ND if source == "table" else output.states_ND)[0]
        torch.testing.assert_close(vectors["before"][row], expected_D)
        projected_H = bundle.model.adapter.nodes(expected_D)
        cosine = torch.nn.functional.cosine_similarity(projected_H, vectors[PROJECTED][row], dim=0)
        assert cosine.item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(vectors[SHUFFLED].sort(0).values, vectors["before"].sort(0).values)
    assert vectors[RANDOM].shape == vectors[PROJECTED].shape == vectors[ENCODED].shape


@torch.no_grad()
def test_the_state_at_a_node_is_the_hidden_state_of_a_prompt_that_ends_there(tmp_path):
    states = {}
    for name, behave in (("ends", "Next? {nodes}"), ("goes on", "Next? {nodes} {graph} =")):
        file = tmp_path / f"{name}.yaml"
        file.write_text(PROMPTS.replace("Next? {nodes} {graph} =", behave))
        settings = config()
        settings.prompt.templates = str(file)
        settings.llm.dtype = "float32"
        bundle = bundle_of(settings)
        items_N = items_of(bundle)
        states[name] = hybrid_encoding.encode(bundle, items_N, seed=0)[ENCODED]
        batch = bundle.collate(hybrid_encoding.single_clicks(items_N))
        hidden_NH = bundle.model.encode(bundle.model.look_up(batch), batch, "behave")
        assert torch.allclose(states[name], hidden_NH, atol=1e-5) == (name == "ends")
    # The state at a node does not depend on the tokens after it.
    torch.testing.assert_close(states["ends"], states["goes on"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_projection_that_keeps_the_neighbors_is_told_from_one_that_loses_them():
    bundle = bundle_of(config())
    weight_HD = bundle.model.adapter.nodes.weight
    items_N = items_of(bundle)
    kept_HD = torch.linalg.qr(torch.randn(weight_HD.shape, generator=torch.Generator().manual_seed(0))).Q
    shares = []
    for weights_HD in (kept_HD, kept_HD * (torch.arange(weight_HD.shape[1]) < 1)):
        weight_HD.copy_(weights_HD)
        vectors = hybrid_encoding.encode(bundle, items_N, seed=0)
        shares.append(shared_neighbors(vectors["before"], vectors[PROJECTED], 5).mean().item())
    assert shares[0] == pytest.approx(1, abs=1e-3)
    assert shares[1] < 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--neighbors", "0"], "--neighbors is 0; give numbers from 1"),
        (["--neighbors", "x"], "--neighbors is x; give numbers from 1"),
        (
            ["--neighbors", "500"],
            "are too few for 500 neighbors, which need 502; raise --items or lower --neighbors",
        ),
        (["--items", "20"], "20 items to compare"),
    ],
)
def test_a_bad_argument_is_one_line(monkeypatch, capsys, tmp_path, words, message):
    arguments = ["--run", str(small_run().run), "--output", str(tmp_path / "out.json"), *words]
    monkeypatch.setattr(sys, "argv", ["hybrid_encoding", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_cli(hybrid_encoding.main)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_a_run_without_node_tokens_or_without_a_language_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no finished stage align or behave; train one with"):
        hybrid_encoding.main(["--run", str(run_with(tmp_path / "run", "sbr")), "--threads", "1"])
    recommender = load_bundle(small_run().run / "export" / "sbr")
    with pytest.raises(UserError, match="has no language model"):
        hybrid_encoding.encode(recommender, items_of(recommender), seed=0)
    settings = config()
    (tmp_path / "p.yaml").write_text(PROMPTS.replace("{nodes} {graph}", "{graph}"))
    settings.prompt.templates = str(tmp_path / "p.yaml")
    with pytest.raises(UserError, match=r"has no \{nodes\}"):
        hybrid_encoding.encode(bundle_of(settings), torch.arange(9), seed=0)
