import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmgr_rec.data.graph import build_graphs
from llmgr_rec.data.jagged import Jagged, lengths_to_offsets
from llmgr_rec.data.prompt_templates import parse_template
from llmgr_rec.modules.prompts import CompiledPrompt, compile_prompt, prompt_nodes
from llmgr_rec.storage.pretrained import load_tokenizer

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


def tokens_of(packed, tokens):
    """Pairs of token id and soft row."""
    return list(zip(packed.token_ids_X[tokens].tolist(), packed.soft_rows_X[tokens].tolist(), strict=True))


def plain_prompt(segments, graph, nodes, text):
    """One prompt after its prefix, as pairs of token id and soft row."""
    pairs = []
    for segment in segments:
        if segment == "graph":
            pairs.append((0, graph))
        elif segment == "nodes":
            pairs += [(0, node) for node in nodes]
        else:
            pairs += [(token, -1) for token in (text if segment == "text" else segment)]
    return pairs


@given(prompts_with_rows())
def test_packed_prompts_equal_a_plain_loop(case):
    segments, nodes, text = case
    if not any(len(row) + len(words) for row, words in zip(nodes, text, strict=True)) and "graph" not in segments:
        return
    packed = CompiledPrompt([3, 4], segments)(jagged(nodes), jagged(text))
    assert packed.prefix_P.tolist() == [3, 4]
    assert packed.num_prompts == len(nodes)
    next_soft = len(nodes)
    for row in range(len(nodes)):
        soft = range(next_soft, next_soft + len(nodes[row]))
        next_soft = soft.stop
        path = packed.path(row)
        assert tokens_of(packed, path) == plain_prompt(segments, row, soft, text[row])
        assert packed.position_X[path].tolist() == list(range(len(path)))
        assert (packed.prompt_X[path] == row).all()


@st.composite
def shared_prompts(draw):
    constant = st.lists(st.integers(1, 9), min_size=1, max_size=3)
    segments = ["nodes"]
    for place in draw(st.permutations(["graph", "text"])):
        segments += [draw(constant)] if draw(st.booleans()) else []
        segments += [place] if draw(st.booleans()) else []
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    text = draw(st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=sum(lengths), max_size=sum(lengths)))
    return segments, lengths, text


@given(shared_prompts())
def test_outputs_of_a_pass_equal_prompts_of_growing_prefixes(case):
    segments, lengths, text = case
    nodes = Jagged.from_lengths(torch.arange(sum(lengths)), torch.tensor(lengths))
    packed = CompiledPrompt([3], segments)(nodes, jagged(text), nodes.offsets)
    assert packed.num_prompts == len(lengths)
    output = 0
    for start, length in zip(nodes.offsets.tolist(), lengths, strict=False):
        for count in range(1, length + 1):
            soft = range(sum(lengths) + start, sum(lengths) + start + count)
            path = packed.path(output)
            assert tokens_of(packed, path) == plain_prompt(segments, output, soft, text[output])
            assert packed.position_X[path].tolist() == list(range(len(path)))
            assert packed.output_token_C[output] == path[-1]
            output += 1


def test_what_differs_between_prefixes_must_follow_the_nodes():
    prompt = CompiledPrompt([3], ["graph", "nodes"])
    assert not prompt.supports_one_pass
    with pytest.raises(ValueError, match="first place"):
        prompt(jagged([[0]]), Jagged.empty(1), torch.tensor([0, 1]))


def test_prefix_is_all_before_the_first_placeholder():
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
    assert "text" not in without.segments
    assert "text" in compile_prompt(template, tokenizer, with_text=True).segments


def test_prompt_starts_with_the_special_tokens_of_the_tokenizer():
    class WithStart:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text] + [2] * add_special_tokens}

    prompt = compile_prompt(parse_template("behave", "x{nodes}", "test"), WithStart())
    assert prompt.prefix_P.tolist() == [1, ord("x")]


def test_buffers_follow_the_module():
    prompt = CompiledPrompt([3, 4], ["graph", [5]])
    assert not prompt.state_dict()
    moved = prompt.to("meta")
    assert moved.prefix_P.device.type == "meta"
    assert moved.get_buffer("constant1").device.type == "meta"


@pytest.mark.parametrize("prefix", [[], [3]])
def test_single_session(prefix):
    packed = CompiledPrompt(prefix, ["nodes", [8]])(jagged([[0]]), Jagged.empty(1))
    assert tokens_of(packed, packed.path(0)) == [(0, 1), (8, -1)]
