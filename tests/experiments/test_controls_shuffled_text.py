"""Item texts shuffled between items: the control `shuffled_text`."""

import pytest
import torch

from llmgr_rec.data.item_tokens import tokenize_texts
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.experiments.controls import shuffle_texts
from llmgr_rec.storage.pretrained import load_tokenizer
from tests.data.token_texts import texts_of


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("random-tiny")


def test_shuffled_texts_are_all_elsewhere_and_empty_ones_where_they_were(tokenizer):
    texts = ["" if number % 5 == 2 else f"thing {number}" for number in range(40)]
    tokens = tokenize_texts(texts, tokenizer, 16)
    shuffled = texts_of(shuffle_texts(tokens, seed=3))
    assert sorted(shuffled) == sorted(texts)
    for before, after in zip(texts, shuffled, strict=True):
        assert (before == after) == (before == "")
    assert texts_of(shuffle_texts(tokens, seed=3)) == shuffled
    assert texts_of(shuffle_texts(tokens, seed=4)) != shuffled


@pytest.mark.parametrize("texts", [[], [""], ["alone"], ["", "alone", ""]])
def test_where_there_is_no_other_text_nothing_moves(tokenizer, texts):
    tokens = tokenize_texts(texts, tokenizer, 16)
    assert texts_of(shuffle_texts(tokens, seed=0)) == texts


def test_every_order_of_texts_is_drawn():
    tokens = Jagged.from_lengths(torch.arange(4), torch.ones(4, dtype=torch.int64))
    found = {tuple(shuffle_texts(tokens, seed).values.tolist()) for seed in range(100)}
    # Permutations of four items that are one cycle.
    assert len(found) == 6
