"""Items that no training session holds have no part in any loss: neither right nor wrong."""

import pytest
import torch

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.collate import LogUniformSampler
from llmgr_rec.kernels.softmax_loss import ranking_loss
from llmgr_rec.modules.item_tables import ItemRows
from llmgr_rec.modules.tasks import AlignTask, BehaveTask
from tests.modules.small_llmgr import NUM_ITEMS, catalog, collator, make_llmgr, raw_sessions

UNSEEN = [4, 8, 9]
COUNTS = torch.arange(NUM_ITEMS) + 1
COUNTS[UNSEEN] = 0
IS_UNSEEN = COUNTS == 0
ALL_SEEN = torch.arange(NUM_ITEMS) + 1
SESSIONS, TARGETS = ((1, 2, 3, 2), (7,), (5, 5, 6)), (0, 3, 11)


def batch(candidates, train_count=COUNTS, text="none"):
    items = Catalog(catalog().file, catalog().item_ids, train_count, catalog().features)
    return collator(candidates, 64, text, catalog=items)(raw_sessions(SESSIONS, TARGETS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("candidates", ["full", "sampled"])
def test_an_unseen_candidate_changes_no_loss_and_gets_no_gradient(candidates, dtype):
    torch.manual_seed(0)
    given = batch(candidates)
    where_C = IS_UNSEEN[given.candidates_C]
    assert where_C.sum() == len(UNSEEN)
    queries_BQ, items_CQ = torch.randn(3, 8), torch.randn(len(where_C), 8)
    other_CQ = torch.where(where_C.unsqueeze(1), 9 * torch.randn_like(items_CQ), items_CQ)

    def loss(items):
        return ranking_loss(queries_BQ, items, given.target_columns_B, given.weights_B, 3, 1, given.log_q_C, dtype)

    items_CQ.requires_grad_()
    value = loss(items_CQ)
    value.backward()
    assert value == loss(other_CQ) > 0
    assert not items_CQ.grad[where_C].any()
    assert items_CQ.grad[~where_C].any(dim=1).all()


@pytest.mark.parametrize("stage", ["align", "behave"])
@pytest.mark.parametrize("candidates", ["full", "cached"])
def test_a_stage_does_not_see_the_text_of_unseen_items(stage, candidates):
    model = make_llmgr().eval()
    task = AlignTask(model, 0.0) if stage == "align" else BehaveTask(model)
    text = "random_node" if stage == "align" else "none"

    def loss(train_count):
        model.item_rows_VD = None
        if candidates == "cached":
            full = batch("full")
            rows = model.recommender.item_tables.rows(full.features)
            texts_VH = model.text_tables.embedding_bags["item_text"].weight
            model.cache_catalog(ItemRows(rows.vectors_XD[-NUM_ITEMS:], rows.ids_XD[-NUM_ITEMS:], texts_VH))
        return task(batch(candidates, train_count, text))[0].item()

    before, before_plain = loss(COUNTS), loss(ALL_SEEN)
    with torch.no_grad():
        model.text_tables.embedding_bags["item_text"].weight[UNSEEN] *= -1
    assert loss(COUNTS) == before
    assert loss(ALL_SEEN) != before_plain


def test_where_training_holds_all_items_nothing_is_corrected():
    for candidates in ("none", "cached", "full"):
        assert batch(candidates, ALL_SEEN).log_q_C.numel() == 0
    assert batch("none").log_q_C.numel() == 0


@pytest.mark.parametrize("counts", [COUNTS, ALL_SEEN])
def test_seen_candidates_of_a_sample_are_corrected_by_their_chance_alone(counts):
    given = batch("sampled", counts)
    drawn_C, log_q_C = LogUniformSampler(counts, 64, 0).sample(given.targets_B, 0, 0)
    assert torch.equal(given.candidates_C, drawn_C)
    seen_C = counts[drawn_C] > 0
    assert torch.equal(given.log_q_C[seen_C], log_q_C[seen_C])
