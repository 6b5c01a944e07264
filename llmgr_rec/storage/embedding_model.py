"""The frozen model that encodes item texts for embedding-kNN: any encoder or decoder that transformers has a class for.

Shapes: V items, H hidden width.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmgr_rec.baselines.text_knn import TEXT_FIELDS
from llmgr_rec.config import EMBEDDING_MODEL_IS_LLM, NO_EMBEDDING_MODEL, Config
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.item_tokens import tokenize_texts
from llmgr_rec.errors import UserError
from llmgr_rec.result_cache import CachedResult
from llmgr_rec.storage.machine import processor_name
from llmgr_rec.storage.number_format import resolve_dtype
from llmgr_rec.storage.pretrained import (
    RANDOM_TINY,
    decoder_config,
    load_decoder,
    load_tokenizer,
    pretrained_folder,
    weights_hash,
)

# Longest text of an item, in tokens; longer ones are cut.
MAX_TOKENS = 48
_BATCH_SIZE = 64
_FILE = "embeddings.safetensors"
_SETTING = "blend.embedding_model"
_VERSION_OF_EMBEDDINGS = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbeddingModel:
    """A pre-trained model by its name; nothing is loaded before it is asked for embeddings.

    Args:
        name: Local folder, hub id, `smollm2` or `random-tiny`; see `load_decoder`.
        num_layers: Layers that are used, from the first; 0 uses all.
    """

    name: str
    num_layers: int = 0

    @classmethod
    def of(cls, config: Config) -> Self | None:
        """The encoder that the settings name; None if they name none.

        Args:
            config: All settings.
        """
        name = config.blend.embedding_model
        if name == NO_EMBEDDING_MODEL:
            return None
        return cls(config.llm.name_or_path, config.llm.num_layers) if name == EMBEDDING_MODEL_IS_LLM else cls(name)

    def check(self) -> None:
        """Checks that the model is available.

        Raises:
            UserError: It is not, or has fewer layers.
        """
        with _named_setting():
            decoder_config(self.name, self.num_layers)

    @property
    def num_bytes(self) -> int:
        """Bytes of its weights on disk."""
        if self.name == RANDOM_TINY:
            return 0
        with _named_setting():
            return sum(file.stat().st_size for file in pretrained_folder(self.name).glob("*.safetensors"))

    def key(self) -> str:
        """Hash of all that embeddings depend on beside the items: weights, layers, texts, number format."""
        dtype = str(resolve_dtype("auto"))
        with _named_setting():
            inputs = [weights_hash(self.name), self.num_layers, MAX_TOKENS, TEXT_FIELDS, dtype, _VERSION_OF_EMBEDDINGS]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()

    def embeddings(self, catalog: Catalog) -> Tensor:
        """Mean of the last hidden states of each item's text, float32 [V, H]; zeros for an item without text.

        They are taken from the cache of results, or kept there.

        Args:
            catalog: The items.

        Raises:
            UserError: The model or its tokenizer is not available.
        """
        # Other processors round differently.
        inputs = {"encoder": self.key(), "processor": processor_name()}
        cached = CachedResult("text encodings", inputs, [catalog.file], ("torch", "transformers", "tokenizers"))
        if file := cached.files().get(_FILE):
            return load_file(file)["embeddings"]
        embeddings_VH = self.encode(catalog.texts(list(TEXT_FIELDS), required=False))
        with TemporaryDirectory(prefix="llmgr-encodings-") as folder:
            made = Path(folder) / _FILE
            save_file({"embeddings": embeddings_VH}, made)
            cached.keep({_FILE: made})
        return embeddings_VH

    def encode(self, texts: list[str]) -> Tensor:
        """Mean of the last hidden states of each text, float32; zeros for an empty text.

        Args:
            texts: The texts.

        Raises:
            UserError: The model or its tokenizer is not available.
        """
        # Importing transformers takes seconds.
        from llmgr_rec.modules.language_model import embed_item_texts

        began = time.monotonic()
        with _named_setting():
            tokenizer = load_tokenizer(self.name)
            model = load_decoder(self.name, self.num_layers)
        # Encoders were trained with their special tokens; a decoder has none around a text.
        is_encoder = tokenizer.cls_token is not None
        tokens = tokenize_texts(texts, tokenizer, MAX_TOKENS, special_tokens=is_encoder)
        logger.info("encoding %d texts of %d tokens by %s", len(texts), len(tokens.values), self.name)
        embeddings_VH = embed_item_texts(model, tokens, _BATCH_SIZE)
        logger.info("encoded the texts in %.0f s", time.monotonic() - began)
        return embeddings_VH * torch.tensor([bool(text) for text in texts]).unsqueeze(1)


@contextmanager
def _named_setting() -> Iterator[None]:
    """Names the setting of this encoder in errors of the functions that load language models."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("llm.name_or_path", _SETTING)) from None
