"""Sessions as rows of tokens: where they are read, and what may be left out."""

import pytest
import torch

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.session_tokens import closed, drop_tokens, item_texts, last_places, newest, session_texts

END = 9


def jagged(rows: list[list[int]]) -> Jagged:
    values = torch.tensor([value for row in rows for value in row])
    return Jagged.from_lengths(values, torch.tensor([len(row) for row in rows]))


def rows_of(tokens: Jagged) -> list[list[int]]:
    return [tokens.narrow(row, row + 1).values.tolist() for row in range(tokens.num_rows)]


TEXTS = jagged([[5, 6, END], [END], [7, END]])
CLICKS = jagged([[2, 0], [1, 1, 2]])


def test_texts_are_closed_and_stand_one_after_the_other() -> None:
    assert rows_of(closed(jagged([[5, 6], [], [7]]), END)) == rows_of(TEXTS)
    read = session_texts(TEXTS, CLICKS)
    assert rows_of(read.tokens) == [[7, END, 5, 6, END], [END, END, 7, END]]
    assert read.places_X.tolist() == [1, 4, 5, 6, 8]
    assert last_places(read).places_X.tolist() == [4, 8]
    assert item_texts(TEXTS, torch.tensor([2, 0])).places_X.tolist() == [1, 4]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_no_token_that_is_read_is_left_out(share: float) -> None:
    torch.manual_seed(0)
    read = session_texts(TEXTS, CLICKS)
    left = drop_tokens(read, share)
    assert left.tokens.values[left.places_X].tolist() == [END] * 5
    assert [row.count(END) for row in rows_of(left.tokens)] == [2, 3]
    if share == 0:
        assert rows_of(left.tokens) == rows_of(read.tokens)
    if share == 1:
        assert rows_of(left.tokens) == [[END] * 2, [END] * 3]


def test_the_newest_clicks_are_the_last() -> None:
    assert rows_of(newest(jagged([[1, 2], [], [3, 4, 5, 6, 7]]), 3)) == [[1, 2], [], [5, 6, 7]]
