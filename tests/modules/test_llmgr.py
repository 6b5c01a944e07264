from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmgr_rec.config import EncoderConfig
from llmgr_rec.modules.tasks import AlignTask, BehaveTask
from tests.modules.small_llmgr import NUM_ITEMS, make_batch, make_llmgr, one_pass_batch, score


def whole_catalog():
    """Features with one bag an item, in item order."""
    return make_batch([[item] for item in range(NUM_ITEMS)], [0] * NUM_ITEMS, candidates="none").features


def cache(model):
    model.cache_catalog(model.rows(whole_catalog()))


@pytest.mark.parametrize("head", ["tied", "linear"])
@pytest.mark.parametrize("residual", [True, False])
def test_cached_catalog_candidates_and_item_vectors_agree(head, residual):
    model = make_llmgr(head, residual).eval()
    batch = make_batch()
    scored = score(model, batch)
    torch.testing.assert_close(model(make_batch(candidates="none")), scored.queries_BQ)
    torch.testing.assert_close(model.item_vectors(whole_catalog()), scored.items_CQ)
    if head == "tied":
        cache(model)
        cached = score(model, make_batch(candidates="none"))
        torch.testing.assert_close(cached.items_CQ, scored.items_CQ)
        torch.testing.assert_close(cached.queries_BQ, scored.queries_BQ)


@torch.no_grad()
def test_recommender_queries_score_as_the_recommender_alone():
    model, batch = make_llmgr().eval(), make_batch()
    output = model.look_up(batch)
    scores = model.recommender_queries(batch) @ model.items(output, batch).T
    torch.testing.assert_close(scores, output.queries_BQ @ output.candidates_CQ.T)


def test_recommender_queries_need_a_head_that_adds_the_recommenders_score():
    model = make_llmgr(head="linear", residual=False)
    with pytest.raises(ValueError, match="does not add the recommender's score"):
        model.recommender_queries(make_batch())


def test_cache_is_not_part_of_the_state():
    model = make_llmgr()
    before = model.state_dict().keys()
    cache(model)
    assert model.state_dict().keys() == before


@pytest.mark.parametrize("node_source", ["table", "encoder"])
@pytest.mark.parametrize("node_order", ["clicks", "unique"])
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31))
def test_sessions_do_not_see_each_other_or_the_target(node_source, node_order, seed):
    generator = torch.Generator().manual_seed(seed)
    model = make_llmgr(with_text=True, node_source=node_source, node_order=node_order, max_nodes=3).eval()
    settings_ = {"text": "last_items", "text_items": 2}
    draw = lambda *size: torch.randint(0, NUM_ITEMS, size, generator=generator).tolist()  # noqa: E731
    sessions = [draw(length) for length in (4, 1, 2)]
    together = model(make_batch(sessions, draw(3), **settings_))
    for row, session in enumerate(sessions):
        alone = model(make_batch([session], draw(1), **settings_))
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("node_source", ["table", "encoder"])
def test_what_the_prompt_shows_matters(node_source):
    model = make_llmgr(residual=False, with_text=True, node_source=node_source, max_nodes=2).eval()
    shown = {"text": "last_items", "text_items": 1}

    def query(session, **settings_):
        return model(make_batch([session], [0], **settings_))

    base = query([1, 2, 3], **shown)
    assert not torch.allclose(base, query([1, 3, 2], **shown))
    assert not torch.allclose(base, query([1, 2, 3]))  # without its text
    # An item older than max_nodes is encoded in the graph token alone, and only through the encoder.
    assert not torch.allclose(base, query([4, 2, 3], **shown))


@pytest.mark.parametrize("task", ["behave", "structure_graph", "structure_nodes"])
def test_hidden_states_depend_on_the_soft_tokens_of_the_prompt_only(task):
    model, batch = make_llmgr().eval(), make_batch()
    output = model.look_up(batch)
    hidden_BH = model.encode(output, batch, task)
    other_graphs = replace(output, sessions_BD=torch.randn_like(output.sessions_BD))
    other_nodes = replace(output, rows_ND=torch.randn_like(output.rows_ND))
    assert torch.equal(model.encode(other_graphs, batch, task), hidden_BH) == (task == "structure_nodes")
    assert torch.equal(model.encode(other_nodes, batch, task), hidden_BH) == (task == "structure_graph")


def test_frozen_recommender_has_neither_gradient_nor_dropout():
    model = make_llmgr(encoder=EncoderConfig(dropout=0.5))
    assert not model.recommender.training
    model.train()
    assert not model.recommender.training
    assert model.head.training
    score(model, make_batch()).queries_BQ.sum().backward()
    assert all(parameter.grad is None for parameter in model.recommender.parameters())
    assert model.adapter.nodes.weight.grad.abs().sum() > 0


def test_head_with_text_needs_text_tables():
    model = make_llmgr()
    model.text_tables = None
    with pytest.raises(ValueError, match="without text embeddings"):
        model.item_vectors(whole_catalog())


def _loss_and_gradients(micro_batches, case):
    """Loss, gradients, and the number of values that the forward pass kept for the backward pass."""
    model = make_llmgr(with_text=True, behave="Items:{nodes} {text} Graph:{graph} ->", micro_batches=micro_batches)
    if case == "align":
        task, batch = AlignTask(model, 0.5), make_batch(text="random_node")
    else:
        batch = one_pass_batch(text="last_items", text_items=1) if case == "one pass" else make_batch(text="last_items")
        task = BehaveTask(model, one_pass=case == "one pass")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss, _ = task.train()(batch)
    loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return loss.detach(), gradients, sum(kept)


@pytest.mark.parametrize("case", ["behave", "one pass", "align"])
def test_micro_batches_give_the_gradients_of_the_whole_batch_from_less_memory(case):
    loss, gradients, kept = _loss_and_gradients(1, case)
    assert any("lora_A" in name for name in gradients)
    # Of three prompts, the last number leaves parts empty.
    for micro_batches in (2, 3, 5):
        found, same, less = _loss_and_gradients(micro_batches, case)
        torch.testing.assert_close(found, loss)
        assert same.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(same[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
        assert less < kept / 2
