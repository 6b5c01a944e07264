"""Packed candidates against one prompt for each candidate."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.candidate_prompts import CrossEncoder, pack_candidates
from llmgr_rec.data.jagged import Jagged
from tests.modules.test_language_model import make

tokens = st.lists(st.integers(0, 9), max_size=5)
candidates = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=3)


def jagged(rows: list[list[int]]) -> Jagged:
    values = torch.tensor([value for row in rows for value in row], dtype=torch.int64)
    return Jagged.from_lengths(values, torch.tensor([len(row) for row in rows]))


@given(st.lists(st.tuples(tokens, candidates), min_size=1, max_size=4))
def test_a_candidate_attends_to_its_context_and_to_itself(sessions: list[tuple[list[int], list[list[int]]]]) -> None:
    contexts = [context for context, _ in sessions]
    texts = [text for _, of_context in sessions for text in of_context]
    context_C = torch.tensor([number for number, (_, of_context) in enumerate(sessions) for _ in of_context])
    packed = pack_candidates(torch.tensor([1]), jagged(contexts), jagged(texts), context_C)
    assert packed.num_tokens == sum(map(len, contexts)) + sum(map(len, texts))
    tokens_X = torch.arange(packed.num_tokens)
    attends_XX = packed.attends(tokens_X.unsqueeze(1), tokens_X)
    expected_XX = torch.zeros_like(attends_XX)
    for output, text in enumerate(texts):
        path = packed.path(output)
        assert packed.token_ids_X[path].tolist() == contexts[context_C[output]] + text
        assert packed.position_X[path].tolist() == list(range(len(path)))
        assert packed.output_token_C[output] == path[-1]
        for place, token in enumerate(path):
            expected_XX[token, path[: place + 1]] = True
    assert torch.equal(attends_XX, expected_XX)


def test_scores_and_gradients_are_those_of_one_prompt_for_each_candidate() -> None:
    language_model = make()
    texts = jagged([[5, 6, 2], [7, 2], [2], [8, 9, 10, 11, 2]])
    model = CrossEncoder(language_model, texts, torch.tensor([20, 21]), max_clicks=2)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    clicks, items_BK = jagged([[3, 0, 1], [2], []]), torch.tensor([[0, 1, 3], [3, 3, 2], [1, 0, 2]])
    packed = model.pack(clicks, items_BK)
    model.standardize(packed)
    results = []
    for packs in (True, False):
        language_model.packs_prompts = packs
        model.zero_grad()
        scores_BK = model(packed).view(items_BK.shape)
        scores_BK.square().mean().backward()
        results.append([scores_BK.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert results[0][0].std() > 0.1
    # Equal candidates of a session have equal scores; clicks older than two are not shown.
    torch.testing.assert_close(results[0][0][1, 0], results[0][0][1, 1])
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
