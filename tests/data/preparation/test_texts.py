"""Texts of items: equal texts in different Unicode forms have the same ids, and are written in one form."""

# Letters of other scripts that look like Latin ones are meant.
# ruff: noqa: RUF001

import unicodedata
from pathlib import Path

import pytest

from llmgr_rec.data.preparation.items import brand_values, category_paths
from llmgr_rec.data.words import WORD_RULE
from tests.data.prepare_inputs import prepare, write_items


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("Beauty > Hair Care", ["Beauty", "Beauty > Hair Care"]),
        ("食品 ＞ 茶", ["食品", "食品 > 茶"]),
        ("アクション、コメディ", ["アクション", "コメディ"]),
        ("食品，茶", ["食品", "茶"]),
        ("قهوة، شاي", ["قهوة", "شاي"]),
        (None, []),
    ],
)
def test_category_paths_of_other_scripts(text: str | None, values: list[str]) -> None:
    assert category_paths(text) == values


def test_forms_of_a_text_are_one_value(tmp_path: Path) -> None:
    texts = ["Café", "कॉफ़ी", "カップ"]
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD") for text in texts]
    ids = [f"Ä{number}" for number in range(6)]
    ids[5] = unicodedata.normalize("NFD", ids[5])
    items = write_items(tmp_path / "items.parquet", ids, title=forms, category=forms, brand=forms)
    clicks = [(f"u{user}", item, place) for user in range(3) for place, item in enumerate(ids)]
    found = prepare(tmp_path, clicks, items=str(items))
    by_id = {item["item_id"]: item for item in found.items}
    assert set(by_id) == set(ids), "ids are kept as they are"
    for first, second in zip(ids[:3], ids[3:], strict=True):
        for column in ("title", "category", "brand", "category_ids", "brand_ids", "word_ids"):
            assert by_id[first][column] == by_id[second][column]
        assert unicodedata.is_normalized("NFC", by_id[second]["title"])
    assert {name: feature["num_embeddings"] for name, feature in found.dataset.manifest.features.items()} == {
        "category": 3,
        "brand": 3,
    }
    assert found.dataset.manifest.word_rule == WORD_RULE
    assert brand_values("ＳＯＮＹ ") == ["SONY"]
