import time

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from llmgr_rec.data.graph import SessionGraph, build_graphs, build_graphs_with_torch
from llmgr_rec.data.jagged import lengths_to_offsets
from tests.data.graph_reference import build_graphs_reference

NUM_ITEMS = 5
SESSIONS = st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), max_size=12), max_size=8)


def clicks(sessions: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    items_L = torch.tensor([item for session in sessions for item in session], dtype=torch.int64)
    return items_L, lengths_to_offsets(torch.tensor([len(session) for session in sessions], dtype=torch.int64))


def graph(sessions: list[list[int]], num_items: int = NUM_ITEMS) -> SessionGraph:
    return build_graphs(*clicks(sessions), num_items)


@given(sessions=SESSIONS)
@example(sessions=[])
@example(sessions=[[]])
@example(sessions=[[], [1], []])
@example(sessions=[[0, 0, 0], [0, 1, 0, 1, 0]])
def test_agrees_with_the_plain_loop(sessions: list[list[int]]) -> None:
    items_L, offsets_B1 = clicks(sessions)

    plain = build_graphs_reference(items_L, offsets_B1)

    for build in (build_graphs, build_graphs_with_torch):
        fast = build(items_L, offsets_B1, NUM_ITEMS)
        for fast_tensor, plain_tensor in zip(fast.tensors(), plain.tensors(), strict=True):
            assert fast_tensor.dtype == torch.int64
            assert torch.equal(fast_tensor, plain_tensor)


def test_example_of_the_paper() -> None:
    paper = graph([[1, 2, 3, 2, 4]])
    items = paper.node_items_N

    assert items.tolist() == [1, 2, 3, 4]
    edges = zip(items[paper.edge_src_E].tolist(), items[paper.edge_dst_E].tolist(), strict=True)
    assert set(edges) == {(1, 2), (2, 3), (3, 2), (2, 4)}
    assert paper.edge_count_E.tolist() == [1, 1, 1, 1]


def test_repeated_clicks_give_self_loops_and_repeated_steps_are_counted() -> None:
    repeated = graph([[3, 3, 3, 1, 3, 1]])

    assert repeated.node_items_N.tolist() == [3, 1]
    assert repeated.alias_L.tolist() == [0, 0, 0, 1, 0, 1]
    assert (repeated.edge_src_E.tolist(), repeated.edge_dst_E.tolist()) == ([0, 0, 1], [0, 1, 0])
    assert repeated.edge_count_E.tolist() == [2, 2, 1]


@given(sessions=SESSIONS)
def test_clicks_come_back_from_nodes_and_alias(sessions: list[list[int]]) -> None:
    batch = graph(sessions)

    assert torch.equal(batch.node_items_N[batch.alias_L], clicks(sessions)[0])
    assert torch.equal(batch.node_session_N[batch.alias_L], batch.click_session_L)
    assert torch.equal(batch.node_session_N[batch.edge_src_E], batch.node_session_N[batch.edge_dst_E])
    assert int(batch.edge_count_E.sum()) == sum(max(len(session) - 1, 0) for session in sessions)


def test_last_node_is_that_of_the_last_click_and_none_for_an_empty_session() -> None:
    batch = graph([[1, 2, 1], [], [4], []])

    assert batch.num_sessions == 4
    assert batch.last_node_B.tolist() == [0, -1, 2, -1]
    assert graph([[]]).last_node_B.tolist() == [-1]


def test_no_edge_between_sessions() -> None:
    assert graph([[1], [2], [3]]).edge_src_E.numel() == 0


def test_keys_that_would_need_more_than_64_bits_are_made_of_the_items_of_the_batch() -> None:
    sessions = [[7, 5, 7], [5, (1 << 61) - 1], [], [7, 7]]
    for one, other in zip(graph(sessions, 1 << 61).tensors(), graph(sessions, 1 << 62).tensors(), strict=True):
        assert torch.equal(one, other)
    items_L, offsets_B1 = clicks(sessions)
    plain = build_graphs_reference(items_L, offsets_B1)
    for one, other in zip(graph(sessions, 1 << 61).tensors(), plain.tensors(), strict=True):
        assert torch.equal(one, other)


def test_item_indices_of_huge_catalogs_do_not_collide() -> None:
    num_items = 1 << 40
    batch = graph([[num_items - 1, 0], [num_items - 1, 1, num_items - 1]], num_items)

    assert batch.node_items_N.tolist() == [num_items - 1, 0, num_items - 1, 1]


def test_is_much_faster_than_the_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 18, (2048,), generator=generator)
    items_L = torch.randint(10_000, (int(lengths.sum()),), generator=generator)
    offsets_B1 = lengths_to_offsets(lengths)

    def shortest(repeats: int, build: object, *arguments: object) -> float:
        times = []
        for _ in range(repeats):
            start = time.thread_time()
            build(*arguments)  # type: ignore[operator]
            times.append(time.thread_time() - start)
        return min(times)

    plain = shortest(3, build_graphs_reference, items_L, offsets_B1)
    # CPU time and the best of many runs, so that other processes do not matter much; measured: 30 times as fast.
    assert shortest(200, build_graphs, items_L, offsets_B1, 10_000) < plain / 10
