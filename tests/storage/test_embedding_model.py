"""The frozen model that encodes item texts: encoders and decoders, the cache, and models that are not there."""

from pathlib import Path

import pytest
import torch

from llmgr_rec.config import Config
from llmgr_rec.errors import UserError
from llmgr_rec.modules import language_model
from llmgr_rec.storage.embedding_model import EmbeddingModel
from llmgr_rec.storage.pretrained import load_decoder, load_tokenizer
from tests.small_run import small_run

TEXTS = ["red soap", "", "hair", "soap for red hair", "red red"]


def save_tiny_bert(folder: Path) -> Path:
    """A random sentence encoder with special tokens, as sentence-transformers saves them."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "soap", "for", "hair"]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    settings = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(settings).eval().save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_an_encoder_reads_each_text_with_its_special_tokens_and_without_padding(tmp_path: Path) -> None:
    folder = save_tiny_bert(tmp_path / "bert")
    found = EmbeddingModel(str(folder)).encode(TEXTS)
    tokenizer, model = load_tokenizer(str(folder)), load_decoder(str(folder), dtype="float32")
    for text, embedding in zip(TEXTS, found, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = model(input_ids=ids).last_hidden_state[0].mean(dim=0) if text else torch.zeros(16)
        torch.testing.assert_close(embedding, expected, atol=1e-2, rtol=1e-2)


def test_the_setting_names_a_model_and_its_layers_and_embeddings_are_made_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLMGR_CACHE", str(tmp_path))
    monkeypatch.setenv("LLMGR_CACHE_GB", "1")
    config = Config()
    assert EmbeddingModel.of(config) is None
    config.blend.embedding_model, config.llm.name_or_path, config.llm.num_layers = "llm", "random-tiny", 1
    of_llm = EmbeddingModel.of(config)
    config.blend.embedding_model = "random-tiny"
    whole = EmbeddingModel.of(config)
    assert (of_llm, whole) == (EmbeddingModel("random-tiny", 1), EmbeddingModel("random-tiny", 0))
    assert of_llm is not None
    assert whole is not None
    assert of_llm.key() != whole.key()
    first = of_llm.embeddings(small_run().catalog)
    assert not torch.equal(whole.embeddings(small_run().catalog), first)
    monkeypatch.setattr(language_model, "embed_item_texts", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(of_llm.embeddings(small_run().catalog), first)


def test_a_model_that_is_not_there_is_named_by_its_setting() -> None:
    with pytest.raises(UserError, match=r"^blend\.embedding_model: folder /absent does not exist"):
        EmbeddingModel("/absent").check()
