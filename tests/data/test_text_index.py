"""The index of texts finds what a dictionary does, also where hashes collide."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmgr_rec.data import text_index
from llmgr_rec.data.text_index import TextIndex


@given(st.lists(st.text(max_size=5), unique=True, min_size=1, max_size=30), st.lists(st.text(max_size=5), max_size=20))
def test_it_finds_what_a_dictionary_does(texts: list[str], others: list[str]) -> None:
    column = pa.array(["before", *texts], pa.large_string())[1:]
    asked = [*others, None, *texts[::-1]]
    # Slices, whose offsets do not begin at 0.
    found = TextIndex(column).positions(pa.array(["before", *asked], pa.large_string())[1:])
    positions = {text: place for place, text in enumerate(texts)}
    assert found.tolist() == [positions.get(text, -1) for text in asked]
    assert found.dtype == np.int64


def test_no_text_and_only_nulls_are_found_nowhere() -> None:
    index = TextIndex(pa.array(["", "a"], pa.large_string()))
    assert index.positions(pa.array([], pa.large_string())).tolist() == []
    assert index.positions(pa.array([None, None], pa.large_string())).tolist() == [-1, -1]
    assert index.positions(pa.array([""], pa.large_string())).tolist() == [0]


@pytest.mark.parametrize("known", [["a", "b", "c"], ["a"]])
def test_texts_of_one_hash_are_told_apart(known: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_index, "text_hashes", lambda texts: np.zeros(len(texts), np.uint64))
    found = TextIndex(pa.array(known, pa.large_string())).positions(pa.array(["c", "x", None, "a"], pa.large_string()))
    assert found.tolist() == [known.index("c") if "c" in known else -1, -1, -1, 0]
