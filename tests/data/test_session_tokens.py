"""Sessions as rows of tokens: the positions of end tokens, and which tokens may be dropped."""

import pytest
import torch

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.session_tokens import (
    append_token,
    drop_tokens,
    item_sequences,
    last_clicks,
    last_positions,
    session_sequences,
)

END = 9


def jagged(rows: list[list[int]]) -> Jagged:
    values = torch.tensor([value for row in rows for value in row])
    return Jagged.from_lengths(values, torch.tensor([len(row) for row in rows]))


def rows_of(tokens: Jagged) -> list[list[int]]:
    return [tokens.narrow(row, row + 1).values.tolist() for row in range(tokens.num_rows)]


TEXTS = jagged([[5, 6, END], [END], [7, END]])
CLICKS = jagged([[2, 0], [1, 1, 2]])


def test_texts_of_a_session_are_joined_each_with_an_end_token() -> None:
    assert rows_of(append_token(jagged([[5, 6], [], [7]]), END)) == rows_of(TEXTS)
    texts = session_sequences(TEXTS, CLICKS)
    assert rows_of(texts.tokens) == [[7, END, 5, 6, END], [END, END, 7, END]]
    assert texts.positions_X.tolist() == [1, 4, 5, 6, 8]
    assert last_positions(texts).positions_X.tolist() == [4, 8]
    assert item_sequences(TEXTS, torch.tensor([2, 0])).positions_X.tolist() == [1, 4]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_end_tokens_are_never_dropped(share: float) -> None:
    torch.manual_seed(0)
    texts = session_sequences(TEXTS, CLICKS)
    kept = drop_tokens(texts, share)
    assert kept.tokens.values[kept.positions_X].tolist() == [END] * 5
    assert [row.count(END) for row in rows_of(kept.tokens)] == [2, 3]
    if share == 0:
        assert rows_of(kept.tokens) == rows_of(texts.tokens)
    if share == 1:
        assert rows_of(kept.tokens) == [[END] * 2, [END] * 3]


def test_last_clicks_are_the_last_of_each_session() -> None:
    assert rows_of(last_clicks(jagged([[1, 2], [], [3, 4, 5, 6, 7]]), 3)) == [[1, 2], [], [5, 6, 7]]
