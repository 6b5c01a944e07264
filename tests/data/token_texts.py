"""Texts of token ids of `random-tiny`."""

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.storage.pretrained import load_tokenizer


def texts_of(tokens: Jagged) -> list[str]:
    """The text of each row of token ids."""
    tokenizer = load_tokenizer("random-tiny")
    bounds = zip(tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist(), strict=True)
    return [tokenizer.decode(tokens.values[start:end]) for start, end in bounds]
