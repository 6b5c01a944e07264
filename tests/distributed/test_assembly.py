"""What settings make of the catalog's text, and models under the controls as bundles."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llmgr_rec.distributed.assembly import (
    Purpose,
    assemble_decoder,
    assemble_llmgr,
    decoder_hash,
    item_tokens,
    make_collator,
)
from torch import Tensor

from llmgr_rec.config import Config
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.errors import UserError
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.storage.bundle import load_bundle
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.storage.bundle_index import read_index
from llmgr_rec.storage.pretrained import load_tokenizer
from llmgr_rec.storage.table_io import init_tables
from tests.modules.small_llmgr import raw_sessions
from tests.small_run import NUM_ITEMS, ONE_RANK, config, small_run

CPU = torch.device("cpu")
CONTROLS = ("random_llm", "shuffled_text", "no_graph", "no_nodes")


def settings(*controls: str) -> Config:
    chosen = config()
    chosen.llm.dtype = "float32"
    chosen.prompt.text_items = 2
    chosen.prompt.max_text_tokens = 64
    for control in controls:
        setattr(chosen.controls, control, True)
    return chosen


def words(tokens: Jagged) -> list[str]:
    tokenizer = load_tokenizer("random-tiny")
    bounds = zip(tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist(), strict=True)
    return [tokenizer.decode(tokens.values[start:end]) for start, end in bounds]


def test_titles_in_the_prompt_can_be_read() -> None:
    catalog = small_run().catalog
    texts = catalog.texts(["title", "category"])
    batch = make_collator(settings(), catalog, "rank", language=True)(raw_sessions([[4, 5, 6], [7]], [-1, -1]))
    assert words(batch.text_tokens) == [f"{texts[5]}; {texts[6]}", texts[7]]


def test_shuffled_texts_are_those_of_other_items_wherever_text_is_read() -> None:
    catalog = small_run().catalog
    chosen, texts = settings("shuffled_text"), words(item_tokens(settings(), catalog))
    shuffled = words(item_tokens(chosen, catalog))
    assert sorted(shuffled) == sorted(texts)
    assert not any(one == other for one, other in zip(texts, shuffled, strict=True))
    raw = raw_sessions([[4, 5, 6], [7]], [-1, -1])
    for purpose in ("behave", "rank"):
        batch = make_collator(chosen, catalog, purpose, language=True)(raw)  # type: ignore[arg-type]
        assert words(batch.text_tokens) == [f"{shuffled[5]}; {shuffled[6]}", shuffled[7]]
    batch = make_collator(chosen, catalog, "align", language=True)(raw)
    assert words(batch.text_tokens) == [shuffled[item] for item in batch.text_items_B.tolist()]


def test_shuffled_words_are_those_of_other_items_and_nothing_else_moves() -> None:
    catalog = small_run().catalog
    items = torch.arange(catalog.num_items)
    # Two words an item, which nobody else has, and none on the first one.
    of_words = Jagged.from_lengths(torch.arange(2 * NUM_ITEMS - 2), torch.tensor([0] + [2] * (NUM_ITEMS - 1)))
    catalog = replace(catalog, features={**catalog.features, "word": of_words})

    def bags(purpose: Purpose, *controls: str) -> dict[str, list[list[int]]]:
        chosen = settings(*controls)
        chosen.tables.side_features = ["category", "word"]
        features = make_collator(chosen, catalog, purpose, language=False).item_features(items)
        return {
            name: [bag.tolist() for bag in features[name].values().split(features[name].lengths().tolist())]
            for name in ("item_id", "category", "word")
        }

    plain, shuffled = bags("sbr"), bags("sbr", "shuffled_words")
    assert bags("rank", "shuffled_words") == shuffled
    assert sorted(shuffled["word"]) == sorted(plain["word"])
    assert [one == other for one, other in zip(plain["word"], shuffled["word"], strict=True)] == [True] + [False] * (
        NUM_ITEMS - 1
    )
    del plain["word"], shuffled["word"]
    assert shuffled == plain


def test_the_hash_is_of_the_decoder_that_is_assembled() -> None:
    plain, random, other = settings(), settings("random_llm"), settings("random_llm")
    other.seed = 1
    decoders = [assemble_decoder(chosen, CPU) for chosen in (plain, random, other)]
    assert len({decoder_hash(chosen) for chosen in (plain, random, other)}) == 3
    assert decoder_hash(settings("random_llm")) == decoder_hash(random)
    embeddings = [decoder.get_input_embeddings().weight for decoder in decoders]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(embeddings[first], embeddings[second])
    assert torch.equal(assemble_decoder(random, CPU).get_input_embeddings().weight, embeddings[1])


def shaken(model: LLMGR) -> LLMGR:
    """Fresh LoRA layers give nothing, so weights are moved to where all of them matter."""
    init_tables(model, 1, 0.5)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding_bags" not in name and ("language_model" not in name or "lora_" in name):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


@torch.no_grad()
def scores(model: LLMGR, chosen: Config, catalog: Catalog) -> Tensor:
    collate = make_collator(chosen, catalog, "rank", language=True)
    items = model.item_vectors(collate.item_features(torch.arange(NUM_ITEMS)))
    return model(collate(raw_sessions([[3, 5, 3, 9], [7], [0, 1, 2]], [-1, -1, -1]))) @ items.T


def test_a_bundle_scores_as_the_model_that_was_exported(tmp_path: Path) -> None:
    catalog = small_run().catalog
    found = {}
    for control in ("", *CONTROLS):
        chosen = settings(*filter(None, [control]))
        model = shaken(assemble_llmgr(chosen, catalog, assemble_decoder(chosen, CPU)))
        found[control] = scores(model, chosen, catalog)
        folder = tmp_path / (control or "none") / "export" / "behave"
        folder.parent.mkdir(parents=True)
        export_bundle(model, "behave", chosen, catalog, folder, ONE_RANK)
        bundle = load_bundle(folder)
        assert isinstance(bundle.model, LLMGR)
        assert torch.equal(scores(bundle.model, bundle.config, bundle.catalog), found[control]), control
        assert read_index(folder).language_model["weights_hash"] == decoder_hash(chosen)
    names = list(found)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            assert not torch.allclose(found[first], found[second], atol=1e-3), (first, second)


def test_a_bundle_whose_weights_cannot_be_drawn_again_is_refused(tmp_path: Path) -> None:
    catalog, chosen = small_run().catalog, settings("random_llm")
    model = assemble_llmgr(chosen, catalog, assemble_decoder(chosen, CPU))
    init_tables(model, 1, 0.5)
    folder = tmp_path / "export" / "behave"
    folder.parent.mkdir()
    export_bundle(model, "behave", chosen, catalog, folder, ONE_RANK)
    text = (folder / "config.yaml").read_text()
    changed = re.sub(r"^seed: 0$", "seed: 5", text, flags=re.M)
    assert changed != text
    (folder / "config.yaml").write_text(changed)
    with pytest.raises(
        UserError, match=r"weights drawn for random-tiny that cannot be drawn again here; .*bundle\.json"
    ):
        load_bundle(folder)
