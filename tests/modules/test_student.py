"""The reader that stands in for the language model."""

import pytest
import torch

from llmgr_rec.modules.groups import select_trainable
from llmgr_rec.modules.student import StudentReader
from llmgr_rec.modules.tasks import DistillTask
from tests.modules.small_llmgr import D1, make_batch, make_llmgr, prefixes_together


def with_student(**settings):
    model = make_llmgr(**settings)
    torch.manual_seed(1)
    model.student = StudentReader(D1, model.language_model.hidden_size, width=32)
    return model


@torch.no_grad()
def test_a_reading_is_of_its_session_alone():
    model = with_student().eval()
    together = make_batch()
    alone = make_batch(sessions=[(5, 5, 6)], targets=[11])
    readings_BH, reading_1H = (model.student(model.look_up(batch), batch.graph) for batch in (together, alone))
    torch.testing.assert_close(readings_BH[2:], reading_1H)


@torch.no_grad()
def test_a_session_without_clicks_gets_a_finite_reading():
    model = with_student().eval()
    batch = make_batch(sessions=[(), (1, 2)], targets=[0, 3])
    assert model.student(model.look_up(batch), batch.graph).isfinite().all()


@torch.no_grad()
def test_quick_queries_are_the_students_or_the_recommenders():
    model, batch = with_student().eval(), make_batch()
    seen = model.look_up(batch)
    by_student = model.head.queries(model.student(seen, batch.graph), seen.queries_BQ)
    torch.testing.assert_close(model.quick_queries(batch), by_student)
    model.student = None
    scores = model.quick_queries(batch) @ model.items(seen, batch).T
    torch.testing.assert_close(scores, seen.queries_BQ @ seen.candidates_CQ.T)


@torch.no_grad()
def test_without_student_a_head_must_know_the_recommender():
    model = make_llmgr(head="linear", residual=False)
    with pytest.raises(ValueError, match="knows nothing of the recommender's score"):
        model.quick_queries(make_batch())


@pytest.mark.parametrize("one_pass", [False, True])
def test_it_learns_the_language_models_ranking(one_pass):
    model = with_student(head="linear", residual=False)
    batch = prefixes_together() if one_pass else make_batch()
    task = DistillTask(model, target_weight=0.0, one_pass=one_pass).train()
    assert not model.language_model.training
    assert model.student.training
    trained = select_trainable(task, ["student"])
    assert trained
    assert all(".student." in f".{name}" for name in trained)
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss, _ = task(batch)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        seen = model.look_up(batch)
        scores = model(batch) @ model.items(seen, batch).T
        learned = model.quick_queries(batch) @ model.items(seen, batch).T
    torch.testing.assert_close(learned.softmax(1), scores.softmax(1), atol=0.02, rtol=0)


def test_a_model_without_student_cannot_learn():
    with pytest.raises(ValueError, match="built without a student"):
        DistillTask(make_llmgr(), 0.5)(make_batch())
