from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmgr_rec.data import catalog_columns
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.schema import hash_item_ids
from llmgr_rec.errors import UserError

from .files import items_table, write_items


def test_loads_what_the_file_holds(tmp_path: Path) -> None:
    catalog = Catalog.load(write_items(tmp_path, 3, category_ids=[[0, 1], [], [4]], train_count=[5, 0, 2]))

    assert catalog.num_items == 3
    assert catalog.item_ids.to_pylist() == ["id0", "id1", "id2"]
    assert catalog.train_count_V.tolist() == [5, 0, 2]
    assert list(catalog.features) == ["category"]
    assert catalog.num_embeddings == {"category": 5}
    assert catalog.features["category"].values.tolist() == [0, 1, 4]
    assert catalog.features["category"].offsets.tolist() == [0, 2, 2, 3]
    assert catalog.titles() == ["Title 0", "Title 1", "Title 2"]
    assert catalog.hash == hash_item_ids([pa.array(["id0", "id1", "id2"])])


@pytest.mark.parametrize("ids", [["", "é", "c", "dd", "c\0"], [3, -1, 0, 2**62, 7]])
def test_batches_of_rows_make_the_columns_of_one_batch(
    ids: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = [[0, 1], None, [], [4], [2, 2, 9]]
    folder = write_items(tmp_path, 5, item_id=ids, word_ids=lists, train_count=[5, 0, 2, 1, 3])
    whole = Catalog.load(folder)
    assert whole.item_ids.to_pylist() == ids
    assert whole.features["word"].values.tolist() == [0, 1, 4, 2, 2, 9]
    assert whole.features["word"].offsets.tolist() == [0, 2, 2, 2, 3, 6]
    monkeypatch.setattr(catalog_columns, "_BATCH_ROWS", 2)
    # Ids of one hash are compared themselves.
    monkeypatch.setattr(catalog_columns, "text_hashes", lambda texts: np.zeros(len(texts), np.uint64))
    found = Catalog.load(folder)
    assert found.item_ids.equals(whole.item_ids)
    assert found.hash == whole.hash
    assert found.features_hash == whole.features_hash
    assert found.train_count_V.tolist() == [5, 0, 2, 1, 3]
    assert found.features["word"].values.untyped_storage().nbytes() == 6 * 4
    found.forget_ids()
    assert found.hash == whole.hash
    assert found.num_items == 5
    assert found.item_ids.equals(whole.item_ids)


def test_string_ids_are_found(tmp_path: Path) -> None:
    catalog = Catalog.load(write_items(tmp_path, 4))

    assert catalog.index_of(pa.array(["id3", "nothing", None, "id0"])).tolist() == [3, -1, -1, 0]
    assert catalog.index_of(pa.chunked_array([["id1"], ["id2"]])).tolist() == [1, 2]
    assert catalog.index_of(pa.array(["id1", "id1"]).dictionary_encode()).tolist() == [1, 1]
    assert catalog.index_of(pa.array(["id2"], pa.large_string())).tolist() == [2]
    assert catalog.index_of(pa.array([], pa.string())).tolist() == []


def test_integer_ids_are_found(tmp_path: Path) -> None:
    catalog = Catalog.load(write_items(tmp_path, 3, item_id=[50, -7, 9]))

    assert catalog.index_of(pa.array([9, 50, None, 8, -7, 99])).tolist() == [2, 0, -1, -1, 1, -1]
    assert catalog.index_of(pa.array([9], pa.int32())).tolist() == [2]
    assert catalog.index_of(pa.array([], pa.int64())).tolist() == []
    assert catalog.index_of(pa.nulls(2)).tolist() == [-1, -1]
    hashes = [2**64 - 1, 9, 2**63, None, 2**63 - 1]
    assert catalog.index_of(pa.array(hashes, pa.uint64())).tolist() == [-1, 2, -1, -1, -1]
    assert catalog.index_of(pa.array(hashes, pa.uint64()).dictionary_encode()).tolist() == [-1, 2, -1, -1, -1]


def test_ids_that_have_been_floats_are_found(tmp_path: Path) -> None:
    numbers = Catalog.load(write_items(tmp_path / "numbers", 3, item_id=[50, -7, 2**60]))
    assert numbers.index_of(pa.array([50.0, -7.0, None, float("nan"), 8.0])).tolist() == [0, 1, -1, -1, -1]
    assert numbers.index_of(pa.array([50, -7], pa.float32())).tolist() == [0, 1]
    texts = ["50", "-7.0", "x", "050", "50.5", "", None, str(2**60), str(2**63)]
    assert numbers.index_of(pa.array(texts)).tolist() == [0, 1, -1, -1, -1, -1, -1, 2, -1]
    assert numbers.index_of(pa.array(texts, pa.string_view())).tolist()[:2] == [0, 1]
    for wrong in (
        pa.array([50.0, 1.5]),
        pa.array([2.0**53]),
        pa.array([2**24], pa.float32()),
        pa.array([float("inf")]),
    ):
        with pytest.raises(UserError, match=r"1 ids are floats, but no exact integers, such as .* so digits are lost"):
            numbers.index_of(wrong)
    words = Catalog.load(write_items(tmp_path / "words", 3, item_id=["12", "7.0", "x"]))
    assert words.index_of(pa.array(["12.0", "7.0", "7", "x", "x.0", None])).tolist() == [0, 1, -1, 2, -1, -1]


def test_zero_is_not_taken_for_null(tmp_path: Path) -> None:
    catalog = Catalog.load(write_items(tmp_path, 2, item_id=[0, 1]))

    assert catalog.index_of(pa.array([None, 0])).tolist() == [-1, 0]


def test_ids_of_another_type_are_refused(tmp_path: Path) -> None:
    catalog = Catalog.load(write_items(tmp_path, 2))

    with pytest.raises(UserError, match="item ids are bool, but must be text or integers"):
        catalog.index_of(pa.array([True]))


def test_texts_join_the_columns_that_hold_something(tmp_path: Path) -> None:
    folder = write_items(tmp_path, 3, title=["Soap", None, " "], category=["Bath", "Hair", "Nails"])
    catalog = Catalog.load(folder)

    assert catalog.texts(["title", "category"]) == ["Soap, Bath", "Hair", "Nails"]
    assert catalog.titles() == ["Soap", None, " "]


def test_the_hash_with_features_changes_with_the_words_of_the_same_items(tmp_path: Path) -> None:
    folder = write_items(tmp_path, 3)
    plain = Catalog.load(folder)
    assert plain.features_hash == Catalog.load(folder).features_hash != plain.hash
    table = pq.read_table(folder / "items.parquet")
    words = pa.array([[0], [], [1, 0]], pa.list_(pa.int64()))
    pq.write_table(
        table.set_column(table.schema.get_field_index("word_ids"), "word_ids", words), folder / "items.parquet"
    )
    other = Catalog.load(folder)
    assert other.hash == plain.hash
    assert other.features_hash != plain.features_hash


def test_texts_may_be_empty_where_none_is_required(tmp_path: Path) -> None:
    catalog = Catalog.load(write_items(tmp_path, 3, title=["Soap", None, " "]))

    assert catalog.texts(["title"], required=False) == ["Soap", "", ""]


def test_an_item_without_text_is_named(tmp_path: Path) -> None:
    catalog = Catalog.load(write_items(tmp_path, 3, title=["Soap", None, ""]))

    with pytest.raises(UserError, match=r"items\.parquet: 2 items have no text in title, the first is item_id 'id1'"):
        catalog.texts(["title"])


def test_text_columns_must_be_named_and_known(tmp_path: Path) -> None:
    catalog = Catalog.load(write_items(tmp_path, 1))

    with pytest.raises(UserError, match=r"prompt\.text_fields names color"):
        catalog.texts(["color"])
    with pytest.raises(UserError, match=r"prompt\.text_fields is empty"):
        catalog.texts([])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item_id": ["a", "b", "a"]}, "column item_id has 1 duplicate ids, such as 'a'"),
        ({"index": [0, 2, 1]}, "column index does not count 0, 1, 2"),
        ({"category_ids": [[0], [-1], []]}, "column category_ids has a null or negative id"),
        ({"category_ids": [[0], [None], []]}, "column category_ids has a null or negative id"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Catalog.load(write_items(tmp_path, 3, **columns))
    assert str(tmp_path / "items.parquet") in str(error.value)


def test_missing_truncated_and_incomplete_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Catalog.load(tmp_path)
    file = write_items(tmp_path, 3) / "items.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a readable Parquet file"):
        Catalog.load(tmp_path)
    pq.write_table(items_table(3).drop_columns(["train_count"]), file)
    with pytest.raises(UserError, match="has no column train_count"):
        Catalog.load(tmp_path)
    pq.write_table(items_table(0, item_id=pa.array([], pa.string())), file)
    with pytest.raises(UserError, match="the catalog is empty"):
        Catalog.load(tmp_path)
