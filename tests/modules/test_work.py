"""How much work a step does: counts that are the same on any machine, so that a slower way is detected at once."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmgr_rec.modules.param_groups import select_trainable
from llmgr_rec.modules.tasks import BehaveTask
from tests.modules.small_llmgr import make_batch, make_llmgr, one_pass_batch

TRAINED = ["adapter", "lora", "head"]
SESSION = [1, 2, 3, 4, 5, 6, 7, 8]
HIDDEN = 64
COPIES = {"copy_", "clone", "_to_copy", "cat", "index_select", "constant_pad_nd", "repeat"}
WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "masked_select", "bincount"}


class Work(TorchDispatchMode):
    """Counts of one step.

    Args:
        calls: Calls of each operator.
        copied: Elements that copying operators wrote.
        largest: Elements of the largest result.
        linear_rows: Rows of products with a frozen weight of the language model, forward and backward.
    """

    def __init__(self, model):
        super().__init__()
        self.calls, self.copied, self.largest, self.linear_rows = Counter(), 0, 0, 0
        base = model.language_model.base
        self._weights = {m.base_layer.weight.data_ptr() for m in base.modules() if hasattr(m, "base_layer")}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
            self.copied += result.numel() if name in COPIES else 0
        if name == "mm" and args[1].data_ptr() in self._weights:
            self.linear_rows += args[0].shape[0]
        return result


def work_of(batch, one_pass=False, packs_prompts=True, template="Words that all prompts share: items{nodes}{graph}"):
    model = make_llmgr(behave=template).train()
    select_trainable(model, TRAINED)
    model.language_model.packs_prompts = packs_prompts
    task = BehaveTask(model, one_pass=one_pass)
    task(batch)[0].backward()
    with Work(model) as work:
        task(batch)[0].backward()
    return work


def sessions(count, session=SESSION):
    return make_batch([session[:-1]] * count, [session[-1]] * count)


def one_pass_sessions(count, session=SESSION):
    return one_pass_batch([session] * count)


def test_each_token_goes_through_a_layer_once():
    """Of two layers, the first sees prefix and prompts once, the last only last tokens, but for keys and values."""
    prefix = len("Words that all prompts share: items")
    count, prompt = 5, len(SESSION)
    tokens, outputs = prefix + count * prompt, count
    # Seven products forward and as many backward in a whole layer; of the last, two with all tokens and five with those
    # of the outputs. Nothing before the soft tokens trains, yet the prefix's gradient is computed with the rest.
    forward = 7 * tokens + 2 * tokens + 5 * outputs
    assert work_of(sessions(count)).linear_rows == pytest.approx(2 * forward, rel=0.25)
    assert work_of(sessions(count)).linear_rows <= 2 * forward


def test_a_target_at_every_click_costs_two_tokens():
    prefix = len("Words that all prompts share: items")
    one_pass = work_of(one_pass_sessions(4), one_pass=True).linear_rows
    assert one_pass <= 2 * (9 * (prefix + 2 * 4 * 7) + 5 * 4 * 7)
    # A packed prompt for each click costs more, and a padded one, with a whole last layer, ten times as much.
    assert work_of(one_pass_sessions(4)).linear_rows > 1.5 * one_pass
    assert work_of(one_pass_sessions(4), packs_prompts=False).linear_rows > 10 * one_pass


BATCHES = pytest.mark.parametrize(("batch", "one_pass"), [(sessions, False), (one_pass_sessions, True)])


@BATCHES
def test_the_number_of_operators_does_not_depend_on_the_batch(batch, one_pass):
    few, many = (sum(work_of(batch(count), one_pass).calls.values()) for count in (3, 24))
    assert few == many
    # 1,575 when this was written; the session recommender's and the loss's are among them.
    assert many < 1700


@BATCHES
def test_waits_are_only_those_of_the_layout(batch, one_pass):
    """What the host has to know of the batch, it asks before the first layer, and not in each."""
    work = work_of(batch(3), one_pass)
    assert sum(work.calls[name] for name in WAITS) <= 23


@BATCHES
def test_the_prefix_is_copied_for_no_prompt(batch, one_pass):
    """Only its keys and values, copied for each of 24 prompts, would be 96 hidden states a token."""
    long = "Words that all prompts share, " * 8 + "items{nodes}{graph}"
    short = "Words that all prompts share: items{nodes}{graph}"
    # Of short sessions: the scores of attention, which are copied, have a row for each of their tokens.
    copied = [work_of(batch(24, SESSION[:3]), one_pass, template=template).copied for template in (long, short)]
    assert copied[0] - copied[1] < 60 * (len(long) - len(short)) * HIDDEN


def test_copies_stay_small_beside_the_tokens():
    """37 hidden states a token when this was written, forward and backward, in two layers."""
    tokens = len("Words that all prompts share: items") + 24 * 2 * 7
    assert work_of(one_pass_sessions(24), one_pass=True).copied < 40 * tokens * HIDDEN


def test_the_largest_tensor_does_not_hold_prompts_times_prefix_times_width():
    """Nothing larger than the scores of attention is ever made."""
    prefix, tokens = len("Words that all prompts share: items"), 24 * 2 * 7
    heads, longest = 4, 16
    assert work_of(one_pass_sessions(24), one_pass=True).largest <= heads * 2 * tokens * (prefix + longest)
