"""All prefixes of a session encoded in one prompt: equal to a prompt each, and independent of later clicks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmgr_rec.config import EncoderConfig
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.modules.param_groups import param_group
from llmgr_rec.modules.prompts import one_pass_nodes, prompt_nodes
from llmgr_rec.modules.tasks import BehaveTask
from tests.modules.small_llmgr import make_llmgr, one_pass_batch

BEHAVE = {
    "nodes only": "Next?\nItems:{nodes}",
    "graph at the end": "Next?\nItems:{nodes}{graph}",
    "words between": "Next?\nItems:{nodes}; graph {graph} ->",
    "texts": "Next?\nItems:{nodes}[[; titles {text}]], {graph}",
}
SESSIONS = [[1, 2, 3, 2, 4, 8], [7, 9], [5, 5, 6]]


def model_for(name, **given):
    return make_llmgr(behave=BEHAVE[name], with_text=name == "texts", **given).eval()


def batch_for(name, sessions=SESSIONS, **given):
    return one_pass_batch(sessions, **({"text": "last_items", "text_items": 2} if name == "texts" else {}), **given)


def encode_both(model, batch):
    output = model.look_up(batch)
    return model.encode_one_pass(output, batch, "behave"), model.encode(output, batch, "behave")


@pytest.mark.parametrize("name", BEHAVE)
def test_hidden_states_are_those_of_a_prompt_each(name):
    one_pass, each = encode_both(model_for(name), batch_for(name))
    assert one_pass.shape[0] == 5 + 1 + 2
    torch.testing.assert_close(one_pass, each, atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, 11), min_size=2, max_size=7), min_size=1, max_size=4))
def test_one_pass_nodes_are_the_clicks_of_the_longest_prefix(sessions):
    batch = one_pass_batch(sessions)
    one_prompt = one_pass_nodes(batch.graph, batch.pass_offsets_P1)
    shown = [batch.graph.node_items_N[nodes].tolist() for nodes in one_prompt.values.split(one_prompt.lengths.tolist())]
    assert shown == [session[:-1] for session in sessions]


@pytest.mark.parametrize("encoder", [EncoderConfig(), EncoderConfig(steps=2), EncoderConfig(name="stamp")])
def test_the_recommender_shares_states_between_prefixes_where_they_are_equal(encoder):
    model, batch = make_llmgr(encoder=encoder), batch_for("graph at the end", most=3)
    shared, each = model.look_up(batch, one_pass=True), model.look_up(batch)
    for name in ("sessions_BD", "queries_BQ", "rows_ND", "candidates_CQ"):
        torch.testing.assert_close(getattr(shared, name), getattr(each, name))


def test_long_sessions_are_split_into_passes():
    """Prefixes of a pass attend to its nodes from the first one on; their graph is still that of the whole prefix."""
    model, batch = model_for("graph at the end"), batch_for("graph at the end", most=3)
    assert batch.pass_offsets_P1.tolist() == [0, 3, 5, 6, 8]
    output = model.look_up(batch)
    one_pass = model.encode_one_pass(output, batch, "behave")
    nodes = prompt_nodes(batch.graph, "clicks", 20)
    shown = torch.tensor([1, 2, 3, 1, 2, 1, 1, 2])
    newest = nodes.gather(nodes.offsets[1:] - shown, shown)
    each = model.encode_nodes(output, newest, Jagged.empty(8), "behave")
    torch.testing.assert_close(one_pass, each, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BEHAVE)
def test_loss_and_gradients_are_those_of_a_prompt_each(name):
    model = model_for(name)
    batch = batch_for(name)
    found = []
    for one_pass in (True, False):
        model.zero_grad()
        loss, _ = BehaveTask(model, one_pass=one_pass)(batch)
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (fast, fast_gradients), (plain, plain_gradients) = found
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    assert fast_gradients.keys() == plain_gradients.keys()
    assert {param_group(n) for n in fast_gradients} == {"adapter", "lora", "head"}
    for n, gradient in fast_gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[n], atol=1e-5, rtol=1e-4, msg=n)


@pytest.mark.parametrize("name", BEHAVE)
def test_a_later_click_changes_no_earlier_hidden_state(name):
    model = model_for(name)
    first, _ = encode_both(model, batch_for(name))
    changed, _ = encode_both(model, batch_for(name, [[1, 2, 3, 11, 10, 8], *SESSIONS[1:]]))
    torch.testing.assert_close(first[:3], changed[:3], atol=1e-6, rtol=1e-6)
    assert (first[3:5] - changed[3:5]).abs().amax(dim=1).min() > 1e-3
    torch.testing.assert_close(first[5:], changed[5:], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("given", [{"node_source": "encoder"}, {"node_order": "unique"}])
def test_nodes_that_depend_on_later_clicks_are_refused(given):
    model = model_for("nodes only", **given)
    batch = batch_for("nodes only")
    with pytest.raises(ValueError, match="rows of the item tables in order of the clicks"):
        model.encode_one_pass(model.look_up(batch), batch, "behave")


def test_a_planted_leak_through_encoder_states_is_detected():
    """What the refusal guards against: node states of the whole session change hidden states of early prefixes."""
    model = model_for("nodes only", node_source="encoder")

    def leaky(sessions):
        batch = batch_for("nodes only", sessions)
        nodes = one_pass_nodes(batch.graph, batch.pass_offsets_P1)
        return model.encode_nodes(model.look_up(batch), nodes, batch.text_tokens, "behave", batch.pass_offsets_P1)

    change = leaky(SESSIONS)[:3] - leaky([[1, 2, 3, 11, 10, 8], *SESSIONS[1:]])[:3]
    assert change.abs().max() > 1e-4
