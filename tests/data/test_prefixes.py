import torch
from hypothesis import given
from hypothesis import strategies as st

from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.jagged import lengths_to_offsets
from llmgr_rec.data.prefixes import grow_prefixes

SESSIONS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=5)


@given(SESSIONS, st.integers(1, 8))
def test_grown_prefixes_equal_a_plain_loop(sessions: list[list[int]], most: int) -> None:
    count = len(sessions)
    raw = RawSessions(
        items_L=torch.tensor([item for session in sessions for item in session]),
        offsets_B1=lengths_to_offsets(torch.tensor([len(session) for session in sessions])),
        targets_B=torch.arange(count) + 10,
        weights_B=torch.arange(count, dtype=torch.float32),
        rows_B=torch.arange(count) + 20,
        global_size=count,
        step=3,
        epoch=4,
    )

    grown = grow_prefixes(raw, most, global_size=99)

    expected, prompts = [], []
    for row, session in enumerate(sessions):
        following = [*session[1:], 10 + row]
        for place, target in enumerate(following):
            if place % most == 0:
                prompts.append(len(expected))
            expected.append((session[: place + 1], target, float(row), 20 + row))
    clicks = torch.split(grown.items_L, grown.offsets_B1.diff().tolist())
    found = zip(
        (part.tolist() for part in clicks),
        grown.targets_B.tolist(),
        grown.weights_B.tolist(),
        grown.rows_B.tolist(),
        strict=True,
    )
    assert list(found) == expected
    assert grown.pass_offsets_P1.tolist() == [*prompts, len(expected)]
    assert (grown.global_size, grown.step, grown.epoch) == (99, 3, 4)
