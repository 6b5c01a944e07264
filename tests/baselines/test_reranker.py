"""The re-ranker: its fit on validation sessions, the order it gives, and its way through bundle and outputs."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llmgr_rec import Recommender
from llmgr_rec.baselines.blend import Blend
from llmgr_rec.baselines.reranker import DEPTH, FEATURES, TERM_FEATURES, Reranker, import_lightgbm
from llmgr_rec.config import BlendConfig
from llmgr_rec.config_file import save_config
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.ranking import CatalogRanker
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.intervals import Gain
from llmgr_rec.evaluation.protocol import ranked_lists
from llmgr_rec.scoring.program_export import session_program
from llmgr_rec.scoring.score_run import ScoreRequest, score_run
from llmgr_rec.storage.bundle import load_bundle, open_bundle
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.training import preflight, reranker_fit
from llmgr_rec.training.preflight import RunRequest, check_run
from llmgr_rec.training.reranker_fit import with_trees
from llmgr_rec.training.selection import select_on_validation
from tests.explanation.explained import blend
from tests.scoring.sessions import read_scores, write_sessions
from tests.small_run import NUM_ITEMS, ONE_RANK, config, small_run

SESSIONS = [["i3", "i5", "i3", "i9"], ["i2"], ["i0", "i1", "i2"], ["unknown"]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose untrained model has a blend of too little weight, which the trees repair."""
    pytest.importorskip("lightgbm", reason="the extra rerank is not installed")
    folder, data = tmp_path_factory.mktemp("reranker"), small_run()
    bundle, settings = load_bundle(data.run / "export" / "sbr"), config()
    settings.blend = BlendConfig(neighbors=["item_knn", "text_knn"], weights=[1e-3, 1e-3], reranker="lambdamart")
    selection = select_on_validation("sbr", bundle.ranking(), settings, data.dataset, data.catalog, ONE_RANK)
    assert selection.blend is not None
    assert selection.blend.trees
    save_config(settings, folder / "config.yaml")
    where = folder / "export" / "sbr"
    export_bundle(bundle.model, "sbr", settings, data.catalog, where, ONE_RANK, data.dataset.manifest, selection.blend)
    return folder


def test_every_output_has_the_order_of_the_trees(run: Path, tmp_path: Path) -> None:
    bundle, rec = load_bundle(run), Recommender.load(run)
    assert bundle.ranking().reranker is not None
    whole = rec.recommend(SESSIONS, k=NUM_ITEMS).to_pylist()
    without = replace(bundle.ranking(), reranker=None)
    changed = 0
    for (plain, *_), (trees, scores, _) in zip(
        ranked_lists(without, small_run().dataset, "test", ONE_RANK, depth=NUM_ITEMS),
        ranked_lists(bundle.ranking(), small_run().dataset, "test", ONE_RANK, depth=NUM_ITEMS),
        strict=True,
    ):
        assert torch.equal(plain.sort().values, trees.sort().values)
        assert bool((scores.diff(dim=1)[trees[:, 1:] >= 0] <= 0).all())
        changed += int((plain != trees).sum())
    assert changed

    # A shorter list is the beginning of a longer one.
    short = rec.recommend(SESSIONS, k=5).to_pylist()
    assert [row["item_ids"] for row in short] == [row["item_ids"][:5] for row in whole]
    sessions = write_sessions(tmp_path / "sessions.parquet", SESSIONS)
    score_run(ScoreRequest(run=run, input=sessions, output=tmp_path / "scores", k=5))
    scored = read_scores(tmp_path / "scores")
    for row, other in zip(scored, short, strict=True):
        assert row["item_ids"] == other["item_ids"]
        np.testing.assert_allclose(row["scores"], other["scores"], rtol=1e-4)


def test_parts_of_an_explanation_add_up_to_the_score(run: Path) -> None:
    rec = Recommender.load(run)
    ((ids, scores),) = [(row["item_ids"], row["scores"]) for row in rec.recommend(SESSIONS[:1], k=5).to_pylist()]
    explained = rec.explain(SESSIONS[0], k=5).items
    assert [item.item_id for item in explained] == ids
    for item, score in zip(explained, scores, strict=True):
        assert "reranker" in {part.name for part in item.parts}
        assert sum(part.value for part in item.parts) == pytest.approx(score, rel=1e-4)
    assert [item.rank for item in rec.explain(SESSIONS[0], items=ids).items] == [1, 2, 3, 4, 5]


def test_lists_beyond_the_trees_descend_and_damaged_trees_are_refused(run: Path) -> None:
    given = load_bundle(run).blend
    assert given is not None
    assert len(given.terms) == 2
    counts = torch.arange(NUM_ITEMS)
    found = Reranker(given, counts)
    ids = torch.arange(NUM_ITEMS).repeat(1, 3)[:, : DEPTH + 20]
    clicks = Jagged.from_lengths(torch.tensor([3, 5]), torch.tensor([2]))
    again, scores = found.rerank(ids, torch.linspace(3, -3, ids.shape[1])[None], clicks)
    assert torch.equal(again[:, DEPTH:], ids[:, DEPTH:])
    assert bool((scores.diff(dim=1) <= 1e-5).all())
    count = len(FEATURES) + 2 * len(TERM_FEATURES)
    assert found.features(ids.numpy(), scores.numpy(), clicks).shape == (*ids.shape, count)
    with pytest.raises(UserError, match="trees of a blend are damaged"):
        Reranker(replace(given, trees="no trees"), counts).rerank(ids, scores, clicks)


def test_trees_without_a_gain_are_not_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, ranking, data = blend({"item_knn": 1e-3}), load_bundle(run).ranking(), small_run()
    assert given is not None
    monkeypatch.setattr(reranker_fit, "paired_gains", lambda counts: {"ndcg@20": Gain(0.1, -0.1, 0.3)})
    assert with_trees(given, ranking, data.dataset, data.catalog, ONE_RANK) is given


def test_what_cannot_rank_again_says_so(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="an exported program does not"):
        session_program(open_bundle(run), 5)
    ranking = load_bundle(run).ranking()
    with pytest.raises(UserError, match="start one rank"):
        CatalogRanker(
            ranking.model, ranking.collate, World(0, 2, 2, torch.device("cpu")), ranking.blend, None, ranking.reranker
        )
    settings = config()
    settings.blend = BlendConfig(neighbors=["item_knn"], reranker="lambdamart")
    request = RunRequest(settings, small_run().dataset.path, tmp_path / "run", "sbr", resume=False)
    check_run(request)
    monkeypatch.setattr(preflight, "launched_world", lambda device: World(0, 2, 2, torch.device("cpu")))
    with pytest.raises(UserError, match="which one rank fits, but there are 2"):
        check_run(request)


def test_a_missing_library_and_a_missing_blend_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(UserError, match=r"pip install 'llmgr-rec\[rerank\]'"):
        import_lightgbm()
    with pytest.raises(UserError, match=r"blend\.neighbors is empty"):
        BlendConfig(neighbors=[], reranker="lambdamart").validate("blend")


def test_a_file_keeps_the_trees(tmp_path: Path) -> None:
    given = blend({"item_knn": 1.0})
    assert given is not None
    replace(given, trees="tree\nversion=v4\n").save(tmp_path / "blend.npz")
    assert Blend.load(tmp_path / "blend.npz").trees == "tree\nversion=v4\n"
    assert Blend.load(tmp_path / "blend.npz", range(3)).trees == "tree\nversion=v4\n"
