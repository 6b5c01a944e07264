"""Both measures of what a click means find the click on which a planted rule rests, and agree in its sign."""

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional

from datagen.planted import plant
from datagen.planted import sessions as planted_sessions
from llmgr_rec.baselines.sparse_scores import Ints
from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed.ranking import RankingModel
from llmgr_rec.explanation.attribution import gradient_times_input, scores_without
from llmgr_rec.explanation.session_clicks import SessionClicks
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.table_io import init_tables
from tests.small_run import NUM_ITEMS, config, small_run

LENGTH = 5
# Sessions, number of the click on which the rule rests, and the item that follows by the rule.
Planted = tuple[Ints, Ints, Ints]


def last_click(count: int) -> Planted:
    """The rule of `datagen.synthetic` without titles: most often, a certain item follows the last one."""
    world = plant(NUM_ITEMS, LENGTH, text_share=0.0, rare_share=0.3, seed=0)
    items, offsets, _ = next(planted_sessions(world, 3 * count))
    starts = offsets[:-1][np.diff(offsets) >= LENGTH][:count]
    clicks = items[starts[:, None] + np.arange(LENGTH)]
    return clicks, np.full(len(clicks), LENGTH - 1), world.successors_VF[clicks[:, -1], 0]


def any_click(count: int) -> Planted:
    """One of ten items is clicked at any place and decides; the others are drawn from forty items without a meaning."""
    rng = np.random.default_rng(1)
    clicks, keys, places = (
        rng.integers(40, size=(count, LENGTH)),
        rng.integers(10, size=count),
        rng.integers(LENGTH, size=count),
    )
    clicks[np.arange(count), places] = 40 + keys
    return clicks, places, 50 + keys


def trained(encoder: str, score: str, clicks: Ints, targets: Ints) -> RankingModel:
    """A recommender that has learned the rule."""
    settings = config()
    settings.encoder.name, settings.encoder.score, settings.encoder.dropout = encoder, score, 0.0  # type: ignore[assignment]
    factory, catalog = ModelFactory(), small_run().catalog
    torch.manual_seed(0)
    spec = factory.spec("sbr", settings, catalog)
    model = factory.build(spec, None, "cpu")
    init_tables(model, 1, 0.5)
    collate = factory.collator(spec, catalog, "rank")
    items = collate.item_features(torch.arange(NUM_ITEMS))
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for rows in torch.randint(len(clicks), (80, 96)):
        batch = collate(RawSessions.to_rank(as_rows(clicks[rows])))
        scores = model.queries(batch) @ model.item_vectors(items).T
        optimizer.zero_grad()
        functional.cross_entropy(scores, torch.from_numpy(targets[rows])).backward()
        optimizer.step()
    return RankingModel(model.eval().requires_grad_(False), collate, 256)


def as_rows(clicks: Ints) -> Jagged:
    return Jagged.from_lengths(torch.from_numpy(clicks.ravel()), torch.full((len(clicks),), LENGTH))


def shares(ranking: RankingModel, clicks: Ints, places: Ints, targets: Ints) -> dict[str, float]:
    """Shares of the sessions whose target the model ranks first for which a statement is true."""
    vectors = ranking.model.item_vectors(ranking.collate.item_features(torch.arange(NUM_ITEMS)))
    first = (ranking.queries(ranking.collate(RawSessions.to_rank(as_rows(clicks)))) @ vectors.T).argmax(1).numpy()
    found = []
    for session, place, target in zip(clicks, places, targets, strict=True):
        one, items = SessionClicks(session, False, LENGTH), np.array([target])
        score = ranking.queries(ranking.collate(RawSessions.to_rank(one.shown))) @ vectors[items].T
        left_out = (score.numpy() - scores_without(ranking, one.left_out(LENGTH), vectors[items], items))[:, 0]
        gradient = gradient_times_input(ranking, one.shown.values, vectors[items])
        assert gradient is not None
        largest = left_out.argmax() == place, gradient[:, 0].argmax() == place
        found.append((left_out[place] > 0 and gradient[place, 0] > 0, *largest))
    learned = first == targets
    assert learned.mean() > 0.4
    names = ("positive by both", "largest left out", "largest gradient")
    return dict(zip(names, np.mean(np.array(found)[learned], axis=0).tolist(), strict=True))


CASES = [
    pytest.param(rule, encoder, score, marks=[] if not number else pytest.mark.slow)
    for number, (rule, encoder, score) in enumerate(
        product(
            (any_click, last_click),
            ("gcsan", "srgnn", "gru4rec", "sasrec", "esasrec", "hstu", "stamp"),
            ("cosine", "dot"),
        )
    )
]


@pytest.mark.parametrize(("rule", "encoder", "score"), CASES)
def test_both_measures_find_the_click_of_the_rule(rule: object, encoder: str, score: str) -> None:
    assert callable(rule)
    clicks, places, targets = rule(3000)
    ranking = trained(encoder, score, clicks, targets)
    found = shares(ranking, clicks[:60], places[:60], targets[:60])
    assert min(found.values()) > 0.7, found


def test_the_gradient_of_a_linear_encoder_is_what_each_click_adds() -> None:
    clicks, _, targets = any_click(1)
    settings = config()
    settings.encoder.name, settings.encoder.score = "tests.explanation.mean_pool:MeanPool", "dot"
    factory, catalog = ModelFactory(), small_run().catalog
    spec = factory.spec("sbr", settings, catalog)
    model = factory.build(spec, None, "cpu").requires_grad_(False)
    init_tables(model, 1, 0.5)
    ranking = RankingModel(model, factory.collator(spec, catalog, "rank"), 8)
    vectors = model.item_vectors(ranking.collate.item_features(torch.arange(NUM_ITEMS)))
    session = torch.tensor([*clicks[0], clicks[0][0]])
    found = gradient_times_input(ranking, session, vectors[targets])
    expected = vectors[session] @ vectors[targets].T / len(session)
    np.testing.assert_allclose(found, expected, atol=1e-5)
