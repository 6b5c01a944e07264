"""The catalog's text as token ids, made once for a run.

Shapes: V items.
"""

from itertools import chain

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.jagged import Jagged

# Texts handed to the tokenizer at a time: enough for its threads, little beside the catalog.
_TEXTS_AT_ONCE = 8192


def tokenize_items(catalog: Catalog, tokenizer: PreTrainedTokenizerBase, fields: list[str], max_tokens: int) -> Jagged:
    """Token ids of every item's text, without special tokens.

    Args:
        catalog: The items.
        tokenizer: The language model's tokenizer.
        fields: Item columns that are joined into the text, in this order.
        max_tokens: Tokens kept of each text, from its start.

    Returns:
        Token ids, one row an item, int64.

    Raises:
        UserError: An item has no text.
    """
    return tokenize_texts(catalog.texts(fields), tokenizer, max_tokens)


def tokenize_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Jagged:
    """Token ids of each text, without special tokens.

    What looks like a special token inside a text (`<|im_end|>` in a title) is split like any other text, so that a
    catalog cannot close or open a turn of the prompt.

    Args:
        texts: One text a row; an empty one gives an empty row.
        tokenizer: The language model's tokenizer.
        max_tokens: Tokens kept of each text, from its start.
    """
    values, lengths = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        encoded = tokenizer(
            texts[start : start + _TEXTS_AT_ONCE],
            add_special_tokens=False,
            split_special_tokens=True,
            truncation=True,
            max_length=max_tokens,
            return_attention_mask=False,
        )["input_ids"]
        lengths.append(np.fromiter((len(row) for row in encoded), np.int64, len(encoded)))
        values.append(np.fromiter(chain.from_iterable(encoded), np.int64, int(lengths[-1].sum())))
    return Jagged.from_lengths(torch.from_numpy(np.concatenate(values)), torch.from_numpy(np.concatenate(lengths)))
