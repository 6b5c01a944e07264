"""Session graphs by operators against those by numpy."""

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from llmgr_rec.data.graph import build_graphs
from llmgr_rec.data.graph_operators import build_graphs_by_operators, newest_known
from llmgr_rec.data.jagged import Jagged, lengths_to_offsets

NUM_ITEMS = 5
# -1 and NUM_ITEMS are unknown.
SESSIONS = st.lists(st.lists(st.integers(-1, NUM_ITEMS), max_size=12), max_size=8)


@given(sessions=SESSIONS, max_length=st.integers(1, 13), merges_repeats=st.booleans())
@example(sessions=[], max_length=5, merges_repeats=True)
@example(sessions=[[], [-1], []], max_length=5, merges_repeats=True)
@example(sessions=[[0, 0, -1, 0], [0, 1, 0, 1, 0]], max_length=3, merges_repeats=True)
def test_equal_those_of_the_newest_known_clicks(
    sessions: list[list[int]], max_length: int, merges_repeats: bool
) -> None:
    lengths = torch.tensor([len(session) for session in sessions], dtype=torch.int64)
    items_L = torch.tensor([item for session in sessions for item in session], dtype=torch.int64)
    known = [[item for item in session if 0 <= item < NUM_ITEMS] for session in sessions]
    clicks = Jagged.from_lengths(
        torch.tensor([item for session in known for item in session], dtype=torch.int64),
        torch.tensor([len(session) for session in known], dtype=torch.int64),
    )
    shown = (clicks.without_consecutive_repeats() if merges_repeats else clicks).last(max_length)
    expected = build_graphs(shown.values, shown.offsets, NUM_ITEMS)

    clicked = newest_known(items_L, lengths_to_offsets(lengths), NUM_ITEMS, max_length, merges_repeats)
    found = build_graphs_by_operators(*clicked, len(sessions), NUM_ITEMS)

    assert torch.equal(clicked[0], shown.values)
    assert torch.equal(clicked[1], shown.row_of_value)
    for one, other in zip(found.tensors(), expected.tensors(), strict=True):
        assert one.dtype == torch.int64
        assert torch.equal(one, other)
