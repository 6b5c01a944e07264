"""Rows of tables that follow the items and values of another catalog."""

from pathlib import Path

import pytest
import torch

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.preparation.items import frequent_title_words
from llmgr_rec.data.side_values import side_values
from llmgr_rec.errors import UserError
from llmgr_rec.storage.catalog_mapping import CatalogMapping, nearest_known
from tests.data.prepare_inputs import prepare, write_items


def catalog_of(folder: Path, items: dict[str, tuple[str, str]]) -> Catalog:
    """A catalog of items with title and category, each clicked by two users."""
    folder.mkdir()
    titles, categories = ([texts[place] for texts in items.values()] for place in (0, 1))
    path = write_items(folder / "items.parquet", list(items), title=titles, category=categories)
    clicks = [(user, item, number) for user in ("u", "v") for number, item in enumerate(items)]
    return Catalog.of(prepare(folder, clicks, items=str(path)).dataset)


YESTERDAY = {f"i{number}": (f"pen {number % 3}", f"Ink > Kind {number % 2}") for number in range(40)}
TODAY = {
    "n": ("pen 2 pen 3", "Ink > Kind 7"),
    **{item: YESTERDAY[item] for item in reversed(YESTERDAY) if item != "i4"},
}
TODAY |= {f"m{number}": (f"new thing{number % 2}", "Paper") for number in range(4)}


def test_values_of_side_features_are_found_by_name(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path / "a", TODAY)
    values = side_values(catalog)
    assert values["category"][:3] == ["Ink", "Ink > Kind 7", "Ink > Kind 1"]
    assert set(values["word"]) == frequent_title_words(catalog.titles())
    first = [values["word"][value] for value in catalog.features["word"].select(torch.tensor([1])).values.tolist()]
    assert set(first) <= set(TODAY["i39"][0].split())


def test_catalogs_of_another_version_are_refused(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path / "a", YESTERDAY)
    catalog.features["category"].values[0] += 1
    with pytest.raises(UserError, match="another version of llmgr_rec made the ids of feature category"):
        side_values(catalog)


def test_rows_follow_ids_and_values(tmp_path: Path) -> None:
    before, after = catalog_of(tmp_path / "a", YESTERDAY), catalog_of(tmp_path / "b", TODAY)
    mapping = CatalogMapping.between(before, after)
    assert (mapping.num_new, mapping.num_gone) == (5, 1)
    for place, row in enumerate(mapping.known_V.tolist()):
        item = after.item_ids[place].as_py()
        assert row == (list(YESTERDAY).index(item) if item in YESTERDAY else -1)
    for name, rows in mapping.values.items():
        old, new = side_values(before).get(name, []), side_values(after)[name]
        assert [old[row] if row >= 0 else None for row in rows.tolist()] == [one if one in old else None for one in new]
    assert mapping.summary() == "39 items known, 5 new (1 of them with similar texts), 1 gone"
    numbers = torch.arange(40.0)
    moved = mapping.item_rows(numbers).flatten()
    known = mapping.known_V >= 0
    assert torch.equal(moved[known], numbers[mapping.known_V[known]])
    # Four items without a word in common with an old one start from the mean of those with training clicks.
    assert moved[-4:].tolist() == pytest.approx([18.5] * 4)


def test_neighbors_are_the_most_similar_texts() -> None:
    ids, weights = nearest_known(["red pen", "blue pen", "paper", "red ink"], ["red pen", "nothing", ""])
    assert ids[0, 0] == 0
    assert weights[0, 0] > weights[0, 1] > 0
    assert weights.sum(dim=1).tolist() == pytest.approx([1, 0, 0])
    assert nearest_known([], ["pen"])[1].sum() == 0
    assert nearest_known(["pen"], [])[0].shape[0] == 0
