import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.item_tokens import tokenize_items, tokenize_texts
from llmgr_rec.errors import UserError
from llmgr_rec.storage.pretrained import load_tokenizer
from tests.data.token_texts import texts_of


@pytest.fixture
def tokenizer():
    return load_tokenizer("random-tiny")


def make_catalog(folder, titles):
    count = len(titles)
    table = pa.table(
        {
            "index": pa.array(range(count), pa.int64()),
            "item_id": pa.array([f"i{number}" for number in range(count)]),
            "title": pa.array(titles, pa.string()),
            "category": pa.array([None] * count, pa.string()),
            "brand": pa.array(["Acme"] + [None] * (count - 1), pa.string()),
            "description": pa.array([None] * count, pa.string()),
            "train_count": pa.array([1] * count, pa.int64()),
            "category_ids": pa.array([[]] * count, pa.list_(pa.int64())),
            "brand_ids": pa.array([[]] * count, pa.list_(pa.int64())),
        }
    )
    pq.write_table(table, folder / "items.parquet")
    return Catalog.load(folder)


def test_items_are_tokenized_in_order(tmp_path, tokenizer):
    tokens = tokenize_items(make_catalog(tmp_path, ["Soap", "Oil"]), tokenizer, ["title", "brand"], 64)
    assert texts_of(tokens) == ["Soap, Acme", "Oil"]


def test_an_item_without_text_is_named(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"items\.parquet.*no text in title.*'i1'"):
        tokenize_items(make_catalog(tmp_path, ["Soap", None]), tokenizer, ["title"], 64)


def test_texts_are_cut_and_may_be_empty(tokenizer):
    assert texts_of(tokenize_texts(["abcdef", "", "gh"], tokenizer, 3)) == ["abc", "", "gh"]
    assert tokenize_texts([], tokenizer, 3).num_rows == 0


def test_many_texts_keep_their_order(tokenizer):
    texts = [str(number) for number in range(20_000)]
    assert texts_of(tokenize_texts(texts, tokenizer, 8)) == texts


def test_special_tokens_in_a_text_are_ordinary_text(tokenizer):
    tokens = tokenize_texts(["a</s>b"], tokenizer, 16)
    assert tokenizer.eos_token_id not in tokens.values.tolist()
    assert texts_of(tokens) == ["a</s>b"]
