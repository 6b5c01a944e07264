"""The text tower: learned neighbours in text encodings, against a plain loop, and apart from the id rows."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llmgr_rec.config import Config
from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.modules.build import build_recommender
from llmgr_rec.modules.groups import select_trainable
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.modules.tasks import TextTask
from llmgr_rec.modules.text_tower import TextTower
from tests.modules.small_llmgr import NUM_ITEMS, collator, raw_sessions

WIDTH, COLUMNS = 24, 8
SESSIONS, TARGETS = [[1, 2, 3, 2], [7], [5, 5, 6], []], [0, 4, 11, 2]


def recommender_of(two_sided: bool) -> SessionRecommender:
    settings = Config()
    settings.tables.dim = 16
    settings.encoder.dropout = 0.0
    settings.text.dim, settings.text.two_sided = COLUMNS, two_sided
    torch.manual_seed(0)
    model = build_recommender(settings, NUM_ITEMS, {"category": 3}, text_width=WIDTH, tower=True).eval()
    tower = tower_of(model)
    with torch.no_grad():
        texts_of(model).normal_(std=WIDTH**-0.5)[9] = 0
        tower.decay_logit.fill_(0.3)
        for projection in filter(None, (tower.items_projection, tower.clicks_projection)):
            projection.weight.normal_()
    return model


def tower_of(model: SessionRecommender) -> TextTower:
    assert model.text_tower is not None
    return model.text_tower


def texts_of(model: SessionRecommender) -> Tensor:
    assert model.item_text is not None
    weight = model.item_text.text_tables.embedding_bags["item_text"].weight
    assert isinstance(weight, Tensor)
    return weight


def batch() -> SessionBatch:
    return collator(item_text=True)(raw_sessions(SESSIONS, TARGETS))


def plain_scores(model: SessionRecommender) -> Tensor:
    """Scores as the docstring says them, click by click, [B, V]."""
    tower, texts_VH = tower_of(model), texts_of(model)
    clicked = tower.items_projection if tower.clicks_projection is None else tower.clicks_projection
    rows = []
    for session in SESSIONS:
        query = torch.zeros(COLUMNS)
        for age, item in enumerate(reversed(session)):
            query = query + tower.decay_logit.sigmoid() ** age * functional.normalize(clicked(texts_VH[item]), dim=0)
        items_VK = functional.normalize(tower.items_projection(texts_VH), dim=1)
        rows.append(tower.log_scale.exp() * items_VK @ functional.normalize(query, dim=0))
    return torch.stack(rows)


@pytest.mark.parametrize("two_sided", [False, True])
def test_the_tower_agrees_with_a_loop_over_clicks(two_sided: bool) -> None:
    model = recommender_of(two_sided)
    queries_BK, candidates_CK = model.read_texts(batch())
    torch.testing.assert_close(queries_BK @ candidates_CK.T, plain_scores(model))
    assert torch.equal(queries_BK[3], torch.zeros(COLUMNS)), "no clicks"
    assert torch.equal(candidates_CK[9], torch.zeros(COLUMNS)), "no text"


def test_its_score_is_added_to_the_encoders() -> None:
    model = recommender_of(False)
    seen, features = model(batch()), collator(item_text=True).item_features(torch.arange(NUM_ITEMS))
    torch.testing.assert_close(seen.candidates_CQ, model.item_vectors(features))
    torch.testing.assert_close(seen.queries_BQ, model.queries(batch()))
    own = (seen.queries_BQ[:, :16] @ seen.candidates_CQ[:, :16].T).detach()
    torch.testing.assert_close(seen.queries_BQ @ seen.candidates_CQ.T, own + plain_scores(model))


def test_a_click_counts_by_its_age_and_as_often_as_it_was_made() -> None:
    tower = TextTower(WIDTH, COLUMNS, two_sided=False)
    graph: SessionGraph = batch().graph
    decay = tower.decay_logit.sigmoid().item()
    # Nodes stand in order of first click: 1, 2, 3 of the first session, 7, then 5, 6.
    expected = [decay**3, decay**2 + 1, decay, 1, decay**2 + decay, 1]
    assert tower.recency(graph).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("two_sided", [False, True])
def test_the_task_trains_the_tower_and_nothing_else(two_sided: bool) -> None:
    model = recommender_of(two_sided)
    task = TextTask(model)
    trained = select_trainable(task, ["tower"])
    assert {name.split(".")[1] for name in trained} == {"text_tower"}
    loss, _ = task(batch())
    torch.testing.assert_close(loss, functional.cross_entropy(plain_scores(model), torch.tensor(TARGETS)))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in task.named_parameters()}
    assert all(gradients[name] is not None and bool(gradients[name].any()) for name in trained)
    assert all(gradient is None for name, gradient in gradients.items() if name not in trained)


def test_a_task_needs_a_tower() -> None:
    with pytest.raises(ValueError, match="tower"):
        TextTask(build_recommender(Config(), NUM_ITEMS, {}))
