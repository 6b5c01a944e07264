"""Packed sequences against a plain loop over sessions and clicks."""

import doctest
from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st

from llmgr_rec.kernels import packed_sequences
from llmgr_rec.kernels.packed_sequences import PackedSequences, pack_sequences
from tests.modules.graphs import graphs_of

Sessions = Sequence[Sequence[int]]
sessions_lists = st.lists(st.lists(st.integers(0, 4), max_size=9), min_size=1, max_size=5)


def test_the_example_of_the_module_holds() -> None:
    result = doctest.testmod(packed_sequences)
    assert result.attempted >= 6
    assert not result.failed


def packed_items(packed: PackedSequences, node_items_N: torch.Tensor) -> list[list[int]]:
    """Items of each packed session, in the order in which they are packed."""
    found: list[list[int]] = []
    for item, position in zip(node_items_N[packed.node_L].tolist(), packed.position_L.tolist(), strict=True):
        if position == 0:
            found.append([])
        assert position == len(found[-1])
        found[-1].append(item)
    return found


@given(sessions_lists, st.integers(1, 9), st.integers(1, 9))
def test_agrees_with_a_plain_loop(sessions: Sessions, max_clicks: int, prefixes_per_pass: int) -> None:
    """Prefixes of sessions, of which at most so many share a pass; an empty session is a sequence of its own."""
    prefixes: list[Sequence[int]] = []
    passes: list[int] = []
    for session in sessions:
        for length in range(1, len(session) + 1) if session else [0]:
            if (length - 1) % prefixes_per_pass == 0 or not session:
                passes.append(len(prefixes))
            prefixes.append(session[:length])
    passes.append(len(prefixes))
    graph = graphs_of(prefixes)
    packed = pack_sequences(graph, max_clicks, torch.tensor(passes))

    longest = [list(prefixes[stop - 1]) for stop in passes[1:]]
    kept = [clicks[-max_clicks:] for clicks in longest]
    order = sorted(range(len(kept)), key=lambda number: len(kept[number]))
    assert packed_items(packed, graph.node_items_N) == [kept[number] for number in order if kept[number]]

    # Packed number of each click of each pass's longest prefix, None where it is too old.
    number_of: dict[int, list[int | None]] = {}
    count = 0
    for number in order:
        skipped = len(longest[number]) - len(kept[number])
        number_of[number] = [None] * skipped + list(range(count, count + len(kept[number])))
        count += len(kept[number])
    node = 0
    for sequence, clicks in enumerate(prefixes):
        numbers = number_of[next(p for p, stop in enumerate(passes[1:]) if sequence < stop)][: len(clicks)]
        last = numbers[-1] if numbers else None
        assert packed.last_click_B[sequence] == (-1 if last is None else last)
        nodes = graph.node_items_N[graph.node_session_N == sequence].tolist()
        for item in nodes:
            last = numbers[max(place for place, click in enumerate(clicks) if click == item)]
            assert packed.last_click_N[node] == (-1 if last is None else last)
            node += 1


@given(sessions_lists)
def test_padding_and_back_changes_nothing_and_buckets_are_at_least_half_full(sessions: Sessions) -> None:
    packed = pack_sequences(graphs_of(sessions), max_clicks=50)
    values_LF = torch.arange(float(packed.node_L.numel() * 2)).view(-1, 2) + 1
    shapes = []
    unchanged = packed.map_padded(lambda padded: shapes.append(padded.shape) or padded, values_LF)
    assert torch.equal(unchanged, values_LF)
    if values_LF.numel():
        assert sum(rows * width for rows, width, _ in shapes) < 2 * packed.node_L.numel()


def test_buckets_hold_sessions_of_similar_length() -> None:
    packed = pack_sequences(graphs_of([[5, 6, 5, 7], [], [8], [1, 2]]), max_clicks=3)
    shown, click_L1 = [], torch.arange(6.0).unsqueeze(1)
    packed.map_padded(lambda padded: shown.append(padded.squeeze(2).tolist()) or padded, click_L1)
    assert shown == [[[0]], [[1, 2, 0], [3, 4, 5]]]


def test_nodes_without_a_packed_click_keep_their_vectors() -> None:
    packed = pack_sequences(graphs_of([[5, 6, 7], []]), max_clicks=2)
    states_LD, nodes_ND = torch.tensor([[1.0], [2.0]]), torch.tensor([[-1.0], [-2.0], [-3.0]])
    states_ND, sessions_BD = packed.node_states(states_LD, nodes_ND), packed.session_states(states_LD)
    assert states_ND.flatten().tolist() == [-1, 1, 2]
    assert sessions_BD.flatten().tolist() == [2, 0]
