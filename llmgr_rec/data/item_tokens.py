"""Token ids of item texts.

Shapes: V items.
"""

from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.jagged import Jagged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts per call of the tokenizer: enough to use its threads, and little memory compared to the catalog.
_TEXTS_PER_CALL = 8192


def tokenize_items(
    catalog: Catalog, tokenizer: "PreTrainedTokenizerBase", fields: list[str], max_tokens: int
) -> Jagged:
    """Token ids of every item's text, without special tokens.

    Args:
        catalog: The items.
        tokenizer: The language model's tokenizer.
        fields: Text columns that are joined, in this order; see `Catalog.texts`.
        max_tokens: Length to which each text is truncated, in tokens.

    Returns:
        Token ids, int64, one row per item.

    Raises:
        UserError: An item has no text.
    """
    return tokenize_texts(catalog.texts(fields), tokenizer, max_tokens)


def tokenize_texts(
    texts: list[str], tokenizer: "PreTrainedTokenizerBase", max_tokens: int, special_tokens: bool = False
) -> Jagged:
    """Token ids of each text.

    A special token inside a text (`<|im_end|>` in a title) is split like ordinary text, so that a catalog cannot inject
    turns into the prompt.

    Args:
        texts: Texts; an empty text gives an empty row.
        tokenizer: The language model's tokenizer.
        max_tokens: Length to which each text is truncated, in tokens.
        special_tokens: Whether the tokenizer adds its special tokens around each text, also around an empty one.

    Returns:
        Token ids, int64, one row per text.
    """
    values, lengths = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        encoded = tokenizer(
            texts[start : start + _TEXTS_PER_CALL],
            add_special_tokens=special_tokens,
            split_special_tokens=True,
            truncation=True,
            max_length=max_tokens,
            return_attention_mask=False,
        )["input_ids"]
        lengths.append(np.fromiter((len(row) for row in encoded), np.int64, len(encoded)))
        values.append(np.fromiter(chain.from_iterable(encoded), np.int64, int(lengths[-1].sum())))
    return Jagged.from_lengths(torch.from_numpy(np.concatenate(values)), torch.from_numpy(np.concatenate(lengths)))
