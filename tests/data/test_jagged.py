import torch
from hypothesis import given
from hypothesis import strategies as st

from llmgr_rec.data.jagged import Jagged, ranges

SINGLES = st.lists(st.lists(st.integers(-5, 5), min_size=1, max_size=1), min_size=1, max_size=6)
ROWS = st.lists(st.lists(st.integers(-5, 5), max_size=4), min_size=1, max_size=6)


def jagged(rows: list[list[int]]) -> Jagged:
    values = torch.tensor([value for row in rows for value in row], dtype=torch.int64)
    return Jagged.from_lengths(values, torch.tensor([len(row) for row in rows]))


def as_lists(rows: Jagged) -> list[list[int]]:
    return [part.tolist() for part in torch.split(rows.values, rows.lengths.tolist())]


@given(rows=ROWS | SINGLES, data=st.data())
def test_select_takes_rows_in_the_given_order(rows: list[list[int]], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))

    selected = jagged(rows).select(torch.tensor(chosen, dtype=torch.int64))

    assert as_lists(selected) == [rows[row] for row in chosen]
    assert selected.offsets.tolist()[0] == 0


@given(rows=ROWS, data=st.data())
def test_narrow_is_a_slice_of_rows(rows: list[list[int]], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))

    assert as_lists(jagged(rows).narrow(start, stop)) == rows[start:stop]


@given(rows=ROWS)
def test_row_of_value_names_the_row_of_each_value(rows: list[list[int]]) -> None:
    assert jagged(rows).row_of_value.tolist() == [number for number, row in enumerate(rows) for _ in row]


def test_gather_takes_parts_of_rows() -> None:
    parts = jagged([[1, 2, 3], [4, 5]]).gather(torch.tensor([1, 3, 0]), torch.tensor([2, 1, 0]))

    assert as_lists(parts) == [[2, 3], [4], []]


def test_empty_has_rows_without_values() -> None:
    empty = Jagged.empty(3)

    assert (empty.num_rows, empty.lengths.tolist(), empty.values.tolist()) == (3, [0, 0, 0], [])


def test_ranges_count_up_from_their_starts() -> None:
    assert ranges(torch.tensor([7, 0, 2]), torch.tensor([0, 2, 2, 5])).tolist() == [7, 8, 2, 3, 4]


@given(rows=ROWS, count=st.integers(1, 3), data=st.data())
def test_beside_puts_the_same_rows_of_all_parts_together(
    rows: list[list[int]], count: int, data: st.DataObject
) -> None:
    same_number = st.lists(st.lists(st.integers(-5, 5), max_size=4), min_size=len(rows), max_size=len(rows))
    parts = [rows, *(data.draw(same_number) for _ in range(count))]

    beside = Jagged.concatenate([jagged(part) for part in parts])

    assert as_lists(beside) == [[value for part in parts for value in part[row]] for row in range(len(rows))]


@given(rows=ROWS, count=st.integers(1, 5))
def test_rows_shorten_to_their_last_values_and_lose_consecutive_repeats(rows: list[list[int]], count: int) -> None:
    assert as_lists(jagged(rows).last(count)) == [row[-count:] for row in rows]
    without = [[value for value, before in zip(row, [None, *row], strict=False) if value != before] for row in rows]
    assert as_lists(jagged(rows).without_consecutive_repeats()) == without
