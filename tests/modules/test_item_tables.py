"""Item tables: sums of id rows and pooled side features."""

import torch
from torch import Tensor

from llmgr_rec.modules.item_tables import ItemTables
from tests.modules.graphs import NUM_CATEGORIES, NUM_ITEMS, categories_of, features_of

DIM = 4


def table(tables: ItemTables, name: str) -> Tensor:
    return tables.ebc.embedding_bags[name].weight.detach()


def test_vector_is_the_id_row_plus_the_mean_of_category_rows() -> None:
    tables = ItemTables(NUM_ITEMS, {"category": NUM_CATEGORIES}, DIM)
    items = torch.tensor([4, 0, 11, 4])
    rows = tables.rows(features_of(items))
    for item, vector, bare in zip(items.tolist(), rows.vectors_XD, rows.ids_XD, strict=True):
        expected = table(tables, "item_id")[item]
        torch.testing.assert_close(bare, expected)
        if categories_of(item):
            expected = expected + table(tables, "category")[categories_of(item)].mean(0)
        torch.testing.assert_close(vector, expected)
    torch.testing.assert_close(tables(features_of(items)), rows.vectors_XD)


def test_without_side_features_the_vector_is_the_id_row() -> None:
    tables = ItemTables(NUM_ITEMS, {}, DIM)
    items = torch.tensor([3, 1])
    assert torch.equal(tables(features_of(items)), table(tables, "item_id")[items])


def test_features_that_have_no_table_are_left_alone() -> None:
    items = torch.tensor([3, 1, 8])
    plain = ItemTables(NUM_ITEMS, {}, DIM)
    assert plain.rows(features_of(items)).vectors_XD.shape == (3, DIM)


def test_every_looked_up_row_gets_gradient_and_no_other() -> None:
    tables = ItemTables(NUM_ITEMS, {"category": NUM_CATEGORIES}, DIM)
    tables(features_of(torch.tensor([4, 0]))).square().sum().backward()
    touched = tables.ebc.embedding_bags["item_id"].weight.grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == [0, 4]
    touched = tables.ebc.embedding_bags["category"].weight.grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == categories_of(4)


def test_meta_device_takes_no_memory() -> None:
    tables = ItemTables(10**9, {"category": 10**6}, DIM, torch.device("meta"))
    assert all(parameter.is_meta for parameter in tables.parameters())
