"""Packed prompts against the separate prompts that they stand for."""

import doctest

import torch
from hypothesis import given
from hypothesis import strategies as st

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.kernels import prompt_packing
from llmgr_rec.kernels.prompt_packing import PackedPrompts

tokens = st.lists(st.integers(-9, 9), min_size=1, max_size=5)


def jagged(rows: list[list[int]]) -> Jagged:
    values = torch.tensor([value for row in rows for value in row], dtype=torch.int64)
    return Jagged.from_lengths(values, torch.tensor([len(row) for row in rows]))


def path_of(packed: PackedPrompts, output: int) -> list[int]:
    """Values of one output's separate prompt, as they were given."""
    path = packed.path(output)
    assert packed.position_X[path].tolist() == list(range(len(path)))
    assert packed.output_token_C[output] == path[-1]
    pairs = zip(packed.token_ids_X[path].tolist(), packed.soft_rows_X[path].tolist(), strict=True)
    return [token if soft < 0 else -1 - soft for token, soft in pairs]


def test_the_example_of_the_module_holds() -> None:
    result = doctest.testmod(prompt_packing)
    assert result.attempted >= 7
    assert not result.failed


@given(st.lists(tokens, min_size=1, max_size=4))
def test_separate_prompts_are_what_was_given(prompts: list[list[int]]) -> None:
    packed = PackedPrompts.separate(torch.tensor([1]), jagged(prompts))
    assert packed.num_prompts == len(prompts)
    assert [path_of(packed, output) for output in range(len(prompts))] == prompts


@given(st.lists(tokens, min_size=1, max_size=4), st.data())
def test_one_pass_has_the_prompt_of_every_prefix(contexts: list[list[int]], data: st.DataObject) -> None:
    count = sum(map(len, contexts))
    suffix = st.lists(st.integers(-9, 9), max_size=3)
    suffixes = data.draw(st.lists(suffix, min_size=count, max_size=count))
    packed = PackedPrompts.in_one_pass(torch.tensor([1]), jagged(contexts), jagged(suffixes))
    assert packed.num_tokens == count + sum(map(len, suffixes))
    prefixes = [context[: length + 1] for context in contexts for length in range(len(context))]
    found = [path_of(packed, output) for output in range(count)]
    assert found == [prefix + suffix for prefix, suffix in zip(prefixes, suffixes, strict=True)]


@given(st.lists(tokens, min_size=1, max_size=4), st.integers(0, 2))
def test_a_token_attends_only_to_its_own_path(contexts: list[list[int]], suffix_length: int) -> None:
    """Every token, not only those that are read: to those before it on its path, and to itself."""
    count = sum(map(len, contexts))
    suffixes = jagged([[7] * suffix_length] * count)
    packed = PackedPrompts.in_one_pass(torch.tensor([1]), jagged(contexts), suffixes)
    tokens_X = torch.arange(packed.num_tokens)
    attends_XX = packed.attends(tokens_X.unsqueeze(1), tokens_X)
    expected_XX = torch.zeros_like(attends_XX)
    for output in range(count):
        path = packed.path(output).tolist()
        for place, token in enumerate(path):
            expected_XX[token, path[: place + 1]] = True
    assert torch.equal(attends_XX, expected_XX)


def test_tokens_by_prompt_keep_their_order() -> None:
    packed = PackedPrompts.in_one_pass(torch.tensor([1]), jagged([[5, 6], [7]]), jagged([[8], [9], [10]]))
    rows = packed.by_prompt(torch.tensor([5, 0, 3, 2, 1]))
    assert [rows.values[a:b].tolist() for a, b in zip(rows.offsets, rows.offsets[1:], strict=False)] == [
        [1, 2, 4],
        [0, 3],
    ]
