"""Held-out items have no part in any loss: neither right nor wrong."""

from dataclasses import replace

import pytest
import torch

from llmgr_rec.data.collate import Collator
from llmgr_rec.modules.item_tables import ItemRows
from llmgr_rec.modules.losses import distillation_loss, ranking_loss
from llmgr_rec.modules.tasks import AlignTask, BehaveTask
from tests.modules.small_llmgr import NUM_ITEMS, catalogue, item_tokens, make_llmgr, raw_sessions

HELD_OUT = [4, 8, 9]
IS_HELD_OUT = torch.zeros(NUM_ITEMS, dtype=torch.bool)
IS_HELD_OUT[HELD_OUT] = True
SESSIONS, TARGETS = ((1, 2, 3, 2), (7,), (5, 5, 6)), (0, 3, 11)


def batch(candidates, held_out=IS_HELD_OUT, text="none"):
    settings = {"side_features": ["category"], "sampled_items": 64, "text": text, "text_tokens": item_tokens()}
    items = replace(catalogue(), held_out_V=held_out)
    return Collator(items, NUM_ITEMS, candidates=candidates, **settings)(raw_sessions(SESSIONS, TARGETS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("candidates", ["full", "sampled"])
def test_a_held_out_candidate_changes_no_loss_and_gets_no_gradient(candidates, dtype):
    torch.manual_seed(0)
    given = batch(candidates)
    where_C = IS_HELD_OUT[given.candidates_C]
    assert where_C.sum() == len(HELD_OUT)
    queries_BQ, items_CQ = torch.randn(3, 8), torch.randn(len(where_C), 8)
    other_CQ = torch.where(where_C.unsqueeze(1), 9 * torch.randn_like(items_CQ), items_CQ)
    losses = {
        "ranking": lambda items: ranking_loss(
            queries_BQ, items, given.target_columns_B, given.weights_B, 3, 1, given.log_q_C, dtype
        ),
        "distillation": lambda items: distillation_loss(
            queries_BQ, queries_BQ.flip(0), items, given.target_columns_B, given.weights_B, 0.2, 3, 1, given.log_q_C
        ),
    }
    for name, loss in losses.items():
        items_CQ.requires_grad_().grad = None
        value = loss(items_CQ)
        value.backward()
        assert value == loss(other_CQ) > 0, name
        assert not items_CQ.grad[where_C].any(), name
        assert items_CQ.grad[~where_C].any(dim=1).all(), name


@pytest.mark.parametrize("stage", ["align", "behave"])
@pytest.mark.parametrize("candidates", ["full", "cached"])
def test_a_stage_does_not_see_the_text_of_held_out_items(stage, candidates):
    model = make_llmgr().eval()
    task = AlignTask(model, 0.0, 0.1, 0) if stage == "align" else BehaveTask(model)
    text = "random_node" if stage == "align" else "none"

    def loss(held_out):
        model.item_rows_VD = None
        if candidates == "cached":
            full = batch("full")
            rows = model.recommender.item_tables.rows(full.features)
            texts_VH = model.text_tables.embedding_bags["item_text"].weight
            model.cache_catalogue(ItemRows(rows.vectors_XD[-NUM_ITEMS:], rows.ids_XD[-NUM_ITEMS:], texts_VH))
        return task(batch(candidates, held_out, text))[0].item()

    before, before_plain = loss(IS_HELD_OUT), loss(None)
    with torch.no_grad():
        model.text_tables.embedding_bags["item_text"].weight[HELD_OUT] *= -1
    assert loss(IS_HELD_OUT) == before
    assert loss(None) != before_plain


def test_without_held_out_items_nothing_is_corrected():
    for candidates in ("none", "cached", "full"):
        assert batch(candidates, None).log_q_C.numel() == 0
    assert batch("none").log_q_C.numel() == 0
    sampled, plain = batch("sampled"), batch("sampled", None)
    assert torch.equal(sampled.candidates_C, plain.candidates_C)
    seen_C = ~IS_HELD_OUT[plain.candidates_C]
    assert torch.equal(sampled.log_q_C[seen_C], plain.log_q_C[seen_C])
