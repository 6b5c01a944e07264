import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmgr_rec.data.graph import build_graphs
from llmgr_rec.data.jagged import Jagged, lengths_to_offsets
from llmgr_rec.data.pretrained import load_tokenizer
from llmgr_rec.data.prompt_files import parse_template
from llmgr_rec.modules.prompts import CompiledPrompt, compile_prompt, prompt_nodes

sessions_lists = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1, max_size=5)


def graph_of(sessions):
    items = torch.tensor([item for session in sessions for item in session])
    return build_graphs(items, lengths_to_offsets(torch.tensor([len(session) for session in sessions])), 5)


def jagged(rows):
    flat = [value for row in rows for value in row]
    return Jagged.from_lengths(torch.tensor(flat, dtype=torch.int64), torch.tensor([len(row) for row in rows]))


@given(sessions_lists, st.integers(0, 5))
def test_clicks_are_the_newest_clicks_in_order(sessions, max_nodes):
    graph = graph_of(sessions)
    nodes = prompt_nodes(graph, "clicks", max_nodes)
    for row, session in enumerate(sessions):
        shown = nodes.values[nodes.offsets[row] : nodes.offsets[row + 1]]
        assert graph.node_items_N[shown].tolist() == session[-max_nodes:]
        assert (graph.node_session_N[shown] == row).all()


@given(sessions_lists, st.integers(0, 5))
def test_unique_nodes_stand_in_order_of_last_click(sessions, max_nodes):
    graph = graph_of(sessions)
    nodes = prompt_nodes(graph, "unique", max_nodes)
    for row, session in enumerate(sessions):
        shown = nodes.values[nodes.offsets[row] : nodes.offsets[row + 1]]
        expected = [item for place, item in enumerate(session) if item not in session[place + 1 :]]
        assert graph.node_items_N[shown].tolist() == expected[-max_nodes:]


@st.composite
def prompts_with_rows(draw):
    constant = st.lists(st.integers(1, 9), min_size=1, max_size=3)
    segments = []
    for place in draw(st.permutations(["graph", "nodes", "text"])):
        segments.append(place)
        segments += [draw(constant)] if draw(st.booleans()) else []
    count = draw(st.integers(1, 4))
    nodes = draw(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=count, max_size=count))
    text = draw(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=count, max_size=count))
    return segments, nodes, text


@given(prompts_with_rows())
def test_layout_equals_a_plain_loop(case):
    segments, nodes, text = case
    layout = CompiledPrompt([3, 4], segments)(jagged(nodes), jagged(text))
    assert layout.prefix_P.tolist() == [3, 4]
    next_soft = len(nodes)
    for row in range(len(nodes)):
        expected = []
        for segment in segments:
            if segment == "graph":
                expected.append((0, row))
            elif segment == "nodes":
                expected += [(0, next_soft + number) for number in range(len(nodes[row]))]
                next_soft += len(nodes[row])
            else:
                expected += [(token, -1) for token in (text[row] if segment == "text" else segment)]
        length = int(layout.lengths_B[row])
        found = zip(layout.token_ids_BT[row].tolist(), layout.soft_rows_BT[row].tolist(), strict=True)
        assert list(found) == expected + [(0, -1)] * (layout.token_ids_BT.shape[1] - length)


def test_prefix_is_all_before_the_first_place():
    tokenizer = load_tokenizer("random-tiny")
    template = parse_template("behave", "Look at {nodes} and {graph}.", "test")
    prompt = compile_prompt(template, tokenizer)
    assert tokenizer.decode(prompt.prefix_P) == "Look at "
    assert [tokenizer.decode(prompt.get_buffer(s)) if s.startswith("constant") else s for s in prompt.segments] == [
        "nodes",
        " and ",
        "graph",
        ".",
    ]


def test_optional_part_goes_with_its_text():
    tokenizer = load_tokenizer("random-tiny")
    template = parse_template("behave", "A [[titles {text}, ]]B {nodes}", "test")
    without = compile_prompt(template, tokenizer, with_text=False)
    assert tokenizer.decode(without.prefix_P) == "A B "
    assert not without.uses_text
    assert compile_prompt(template, tokenizer, with_text=True).uses_text


def test_prompt_starts_with_the_special_tokens_of_the_tokenizer():
    class WithStart:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text] + [2] * add_special_tokens}

    prompt = compile_prompt(parse_template("behave", "x{nodes}", "test"), WithStart())
    assert prompt.prefix_P.tolist() == [1, ord("x")]


def test_buffers_follow_the_module():
    prompt = CompiledPrompt([3, 4], ["graph", [5]])
    assert not prompt.state_dict()
    layout = prompt.to("meta")
    assert layout.prefix_P.device.type == "meta"
    assert layout.get_buffer("constant1").device.type == "meta"


@pytest.mark.parametrize("prefix", [[], [3]])
def test_single_session(prefix):
    layout = CompiledPrompt(prefix, ["nodes", [8]])(jagged([[0]]), Jagged.empty(1))
    assert layout.token_ids_BT.tolist() == [[0, 8]]
    assert layout.soft_rows_BT.tolist() == [[1, -1]]
