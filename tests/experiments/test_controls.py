"""Controls: models with a part disabled or broken, as bundles and in training."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmgr_rec.config import Config, StageName
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.errors import UserError
from llmgr_rec.experiments.controls import CONTROLS, ConstantTokens, effective_controls, factory_of
from llmgr_rec.modules.adapter import ProjectionAdapter
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.model_spec import Purpose
from llmgr_rec.storage.bundle import load_bundle
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.storage.bundle_index import read_index
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.table_io import init_tables
from llmgr_rec.training.text_embeddings import embed_catalog
from tests.data.token_texts import texts_of
from tests.modules.random_weights import randomize_weights
from tests.modules.small_llmgr import raw_sessions
from tests.small_run import NUM_ITEMS, ONE_RANK, config, small_run

CPU = torch.device("cpu")
OF_LLMGR = ("random_llm", "shuffled_text", "no_graph", "no_nodes")


def factory(*controls: str) -> ModelFactory:
    return factory_of("llmgr", controls)


def settings() -> Config:
    chosen = config()
    chosen.llm.dtype = "float32"
    chosen.prompt.text_items = 2
    chosen.prompt.max_text_tokens = 64
    return chosen


def build(made: ModelFactory, chosen: Config, catalog: Catalog, stage: StageName = "behave") -> LLMGR:
    spec = made.spec(stage, chosen, catalog)
    model = made.build(spec, made.language_parts(spec, catalog, CPU), CPU)
    assert isinstance(model, LLMGR)
    return model


def test_a_model_has_the_controls_that_change_it() -> None:
    assert effective_controls("sbr", CONTROLS) == ["shuffled_words"]
    assert effective_controls("llm_text", CONTROLS) == ["random_llm", "shuffled_text", "shuffled_words"]
    assert effective_controls("llmgr", CONTROLS) == sorted(CONTROLS)
    assert type(factory_of("sbr", ["random_llm"])) is ModelFactory


def test_shuffled_texts_are_those_of_other_items_wherever_text_is_read() -> None:
    catalog = small_run().catalog
    chosen, made = settings(), factory("shuffled_text")
    texts, shuffled = (texts_of(one.item_tokens(chosen, catalog)) for one in (ModelFactory(), made))
    assert sorted(shuffled) == sorted(texts)
    assert not any(one == other for one, other in zip(texts, shuffled, strict=True))
    raw = raw_sessions([[4, 5, 6], [7]], [-1, -1])
    behave, align = (made.spec(stage, chosen, catalog) for stage in ("behave", "align"))
    for purpose in ("train", "rank"):
        batch = made.collator(behave, catalog, purpose)(raw)  # type: ignore[arg-type]
        assert texts_of(batch.text_tokens) == [f"{shuffled[5]}; {shuffled[6]}", shuffled[7]]
    batch = made.collator(align, catalog, "train")(raw)
    assert texts_of(batch.text_tokens) == [shuffled[item] for item in batch.text_items_B.tolist()]


def test_shuffled_words_are_those_of_other_items_and_nothing_else_moves() -> None:
    catalog = small_run().catalog
    items = torch.arange(catalog.num_items)
    # Two words an item, which nobody else has, and none on the first one.
    of_words = Jagged.from_lengths(torch.arange(2 * NUM_ITEMS - 2), torch.tensor([0] + [2] * (NUM_ITEMS - 1)))
    catalog = Catalog(catalog.file, catalog.item_ids, catalog.train_count_V, {**catalog.features, "word": of_words})

    def bags(purpose: Purpose, *controls: str) -> dict[str, list[list[int]]]:
        chosen = settings()
        chosen.tables.side_features = ["category", "word"]
        made = factory(*controls)
        features = made.collator(made.spec("sbr", chosen, catalog), catalog, purpose).item_features(items)
        return {
            name: [bag.tolist() for bag in features[name].values().split(features[name].lengths().tolist())]
            for name in ("item_id", "category", "word")
        }

    plain, shuffled = bags("train"), bags("train", "shuffled_words")
    assert bags("rank", "shuffled_words") == shuffled
    assert sorted(shuffled["word"]) == sorted(plain["word"])
    assert [one == other for one, other in zip(plain["word"], shuffled["word"], strict=True)] == [True] + [False] * (
        NUM_ITEMS - 1
    )
    del plain["word"], shuffled["word"]
    assert shuffled == plain


def test_the_hash_is_of_the_decoder_that_is_made() -> None:
    chosen, other = settings(), settings()
    other.seed = 1
    random = factory("random_llm")
    cases = [(ModelFactory(), chosen), (random, chosen), (random, other)]
    assert len({made.decoder_hash(config) for made, config in cases}) == 3
    embeddings = [made.decoder(config, CPU).get_input_embeddings().weight for made, config in cases]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(embeddings[first], embeddings[second])
    assert torch.equal(random.decoder(chosen, CPU).get_input_embeddings().weight, embeddings[1])


@torch.no_grad()
def scores(model: LLMGR, chosen: Config, catalog: Catalog, made: ModelFactory) -> Tensor:
    collate = made.collator(made.spec("behave", chosen, catalog), catalog, "rank")
    items = model.item_vectors(collate.item_features(torch.arange(NUM_ITEMS)))
    return model(collate(raw_sessions([[3, 5, 3, 9], [7], [0, 1, 2]], [-1, -1, -1]))) @ items.T


def test_a_bundle_scores_as_the_model_that_was_exported(tmp_path: Path) -> None:
    catalog = small_run().catalog
    found = {}
    for control in ("", *OF_LLMGR):
        chosen, made = settings(), factory(*filter(None, [control]))
        model = randomize_weights(build(made, chosen, catalog))
        found[control] = scores(model, chosen, catalog, made)
        folder = tmp_path / (control or "none") / "export" / "behave"
        folder.parent.mkdir(parents=True)
        export_bundle(model, "behave", chosen, catalog, folder, ONE_RANK, factory=made)
        bundle = load_bundle(folder, factory=made)
        assert isinstance(bundle.model, LLMGR)
        assert torch.equal(scores(bundle.model, bundle.config, bundle.catalog, made), found[control]), control
        assert read_index(folder).language_model["weights_hash"] == made.decoder_hash(chosen)
    names = list(found)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            assert not torch.allclose(found[first], found[second], atol=1e-3), (first, second)


def test_a_bundle_is_only_loaded_with_its_controls(tmp_path: Path) -> None:
    catalog, chosen, made = small_run().catalog, settings(), factory("shuffled_text")
    model = build(made, chosen, catalog)
    init_tables(model, 1, 0.5)
    folder = tmp_path / "export" / "behave"
    folder.parent.mkdir()
    export_bundle(model, "behave", chosen, catalog, folder, ONE_RANK, factory=made)
    load_bundle(folder, factory=made)
    with pytest.raises(UserError, match=r"was made by an experiment with controls shuffled_text; train a run without"):
        load_bundle(folder)
    with pytest.raises(UserError, match="was made without controls, not with no_graph"):
        load_bundle(small_run().run / "export" / "behave", factory=factory("no_graph"))


@pytest.mark.parametrize("off", ["no_graph", "no_nodes"])
def test_constant_tokens_are_alike_and_learned(off: str) -> None:
    torch.manual_seed(0)
    plain = ProjectionAdapter(4, 6, 2.0)
    hybrid = ConstantTokens(plain, off == "no_graph", off == "no_nodes")
    graph_CD, nodes_MD = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    plain_SH, soft_SH = plain.project(graph_CD, nodes_MD), hybrid.project(graph_CD, nodes_MD)
    silent, speaking = (slice(0, 2), slice(2, 5)) if off == "no_graph" else (slice(2, 5), slice(0, 2))
    assert torch.equal(soft_SH[speaking], plain_SH[speaking])
    assert (soft_SH[silent] == soft_SH[silent][0]).all()
    torch.testing.assert_close(soft_SH[silent].norm(dim=1), plain_SH[silent].norm(dim=1))
    (soft_SH[silent] * torch.randn(6)).sum().backward()
    vectors, projection = (graph_CD, hybrid.graph) if off == "no_graph" else (nodes_MD, hybrid.nodes)
    assert projection.weight.grad.abs().sum() > 0
    assert vectors.grad is None
    assert plain.state_dict().keys() == hybrid.state_dict().keys()


@pytest.mark.parametrize("off", ["no_graph", "no_nodes"])
@torch.no_grad()
def test_a_model_does_not_read_constant_tokens(off: str) -> None:
    catalog, chosen, made = small_run().catalog, settings(), factory(off)
    model = randomize_weights(build(made, chosen, catalog))
    collate = made.collator(made.spec("behave", chosen, catalog), catalog, "rank")
    batch = collate(raw_sessions([[3, 5, 3, 9], [7], [0, 1, 2]], [-1, -1, -1]))
    output = model.look_up(batch)
    hidden_BH = model.encode(output, batch, "behave")
    sessions_BD, rows_ND = torch.randn_like(output.sessions_BD), torch.randn_like(output.rows_ND)
    other_graphs_BH = model.encode(replace(output, sessions_BD=sessions_BD), batch, "behave")
    other_nodes_BH = model.encode(replace(output, rows_ND=rows_ND), batch, "behave")
    assert torch.equal(other_graphs_BH, hidden_BH) == (off == "no_graph")
    assert torch.equal(other_nodes_BH, hidden_BH) == (off == "no_nodes")


def test_text_embeddings_of_different_controls_lie_in_different_folders(tmp_path: Path) -> None:
    catalog, chosen = small_run().catalog, settings()
    names = [(), ("random_llm",), ("shuffled_text",), ("random_llm", "shuffled_text")]
    found = {}
    for controls in (*names, ("no_graph",)):
        made = factory(*controls)
        tokens, decoder = made.item_tokens(chosen, catalog), made.decoder(chosen, CPU)
        embeddings = embed_catalog(decoder, tokens, ONE_RANK, tmp_path / "embeddings", made.decoder_hash(chosen))
        found[controls] = embeddings.read(range(catalog.num_items), range(16))
    assert len(list((tmp_path / "embeddings").iterdir())) == 4
    assert torch.equal(found["no_graph",], found[()])
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            assert not torch.allclose(found[first], found[second], atol=1e-2), (first, second)
