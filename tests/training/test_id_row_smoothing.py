"""Stage sbr smooths the id rows of cold items: on one rank and on two, and again where asked."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from llmgr_rec.baselines.knn_smoothing import K_NEIGHBORS
from llmgr_rec.baselines.text_knn import texts_to_compare, tf_idf
from llmgr_rec.config import Config
from llmgr_rec.config_file import load_config, save_config
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.protocol import evaluate_model
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.storage.bundle import load_bundle
from llmgr_rec.training import id_row_smoothing
from llmgr_rec.training.preflight import RunRequest, check_run
from llmgr_rec.training.train_run import train_run
from tests.data.prepare_inputs import edit_manifest
from tests.modules.small_llmgr import raw_sessions
from tests.ranks import run_on_ranks
from tests.small_run import ONE_RANK
from tests.training.exported import Exported
from tests.training.small_training import numbers, prepare, records, small_config, train

pytestmark = pytest.mark.dist

SHARDINGS = ("table_wise", "column_wise")
STRENGTHS = [2.0]
(STRENGTH,) = STRENGTHS
Neighbors = tuple[Literal["item_knn", "text_knn"], ...]


def config_of(folder: Path, strengths: list[float] = STRENGTHS, blend: Neighbors = ()) -> Config:
    config = small_config(folder / "prompts.yaml")
    config.align.epochs = config.behave.epochs = 0
    config.tables.side_features = []
    config.tables.knn_smoothing = list(strengths)
    config.blend.neighbors = list(blend)
    return config


def train_case(
    world: World,
    folder: str,
    name: str,
    sharding: str,
    strengths: list[float],
    resume: bool,
    blend: Neighbors = (),
) -> None:
    config = config_of(Path(folder), strengths, blend)
    config.tables.sharding = sharding  # type: ignore[assignment]
    # Several ranges of rows, and strips of columns.
    id_row_smoothing._BLOCK_BYTES = 64 * 4 * 4 * K_NEIGHBORS
    id_row_smoothing.STRIP_BYTES = 0
    run = Path(folder, name)
    if world.rank == 0:
        run.mkdir(exist_ok=True)
    train(world, config, run, Path(folder, "dataset"), resume)


@dataclass
class Trained:
    folder: Path

    @property
    def catalog(self) -> Catalog:
        return Catalog.load(self.folder / "dataset")

    def again(
        self,
        strengths: list[float],
        size: int = 1,
        sharding: str = "column_wise",
        blend: Neighbors = (),
    ) -> Path:
        """Exports stage sbr of the run on one rank anew, from its last checkpoint."""
        name = f"again-{strengths}-{size}-{sharding}-{len(blend)}"
        if (self.folder / name).exists():
            return self.folder / name
        shutil.copytree(self.folder / "1-column_wise", self.folder / name)
        shutil.rmtree(self.folder / name / "export/sbr")
        run_on_ranks(train_case, size, str(self.folder), name, sharding, strengths, True, blend)
        return self.folder / name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("id-row-smoothing")
    prepare(folder, sessions=150, items=200, mean_length=4)
    small_config(folder / "prompts.yaml")
    for size, sharding in ((1, "column_wise"), *((2, sharding) for sharding in SHARDINGS)):
        run_on_ranks(train_case, size, str(folder), f"{size}-{sharding}", sharding, STRENGTHS, False)
        save_config(config_of(folder), folder / f"{size}-{sharding}" / "config.yaml")
    trained = Trained(folder)
    assert 5 < (trained.catalog.train_count_V == 0).sum() < 100
    return trained


def trained_rows(trained: Trained) -> Tensor:
    """The id rows before anything is smoothed."""
    return Exported.read(trained.again([0.0]) / "export/sbr").tables["item_id"]


def neighbors(catalog: Catalog, item: int, cosines_VV: Tensor) -> Tensor:
    """The trained items that share the most telling words with an item, nearest first."""
    cosines_V = cosines_VV[item].where(catalog.train_count_V > 0, 0.0)
    cosines_V[item] = 0.0
    order_V = cosines_V.argsort(descending=True, stable=True)
    return order_V[cosines_V[order_V] > 0][:K_NEIGHBORS]


def cosines(catalog: Catalog) -> Tensor:
    words_VT = torch.from_numpy(tf_idf(texts_to_compare(catalog)).T.toarray())
    # As the neighbors are kept, so that ties are ties.
    return (functional.normalize(words_VT, dim=1) @ functional.normalize(words_VT, dim=1).T).float()


def plain_rows(own_VD: Tensor, catalog: Catalog, strength: float) -> Tensor:
    """The id rows as documented, item by item."""
    cosines_VV = cosines(catalog)
    rows = []
    for item, count in enumerate(catalog.train_count_V.tolist()):
        nearest_N = neighbors(catalog, item, cosines_VV)
        squared_N = cosines_VV[item, nearest_N] ** 2
        mean_D = squared_N @ own_VD[nearest_N] / squared_N.sum()
        rows.append((count * own_VD[item] + strength * mean_D) / (count + strength) if len(nearest_N) else own_VD[item])
    return torch.stack(rows)


@pytest.mark.parametrize(("size", "sharding"), [(1, "column_wise"), (2, "column_wise"), (2, "table_wise")])
def test_rows_are_exported_as_documented(trained: Trained, size: int, sharding: str) -> None:
    expected_VD = plain_rows(trained_rows(trained), trained.catalog, STRENGTH)
    found_VD = Exported.read(trained.folder / f"{size}-{sharding}" / "export/sbr").tables["item_id"]
    torch.testing.assert_close(found_VD, expected_VD, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found_VD, trained_rows(trained), atol=1e-2)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_ranks_compute_what_one_does(trained: Trained, sharding: str) -> None:
    one, two = trained.folder / "1-column_wise", trained.folder / f"2-{sharding}"
    assert numbers(two) == pytest.approx(numbers(one), abs=1e-5)
    # From the same checkpoint, so that only the smoothing can differ.
    again = Exported.read(trained.again(STRENGTHS, 2, sharding) / "export/sbr").tables
    first = Exported.read(one / "export/sbr").tables
    torch.testing.assert_close(again["item_id"], first["item_id"], atol=1e-6, rtol=1e-5)


def test_a_trained_stage_takes_another_strength_without_training(trained: Trained) -> None:
    run = trained.again([7.0])
    expected_VD = plain_rows(trained_rows(trained), trained.catalog, 7.0)
    torch.testing.assert_close(Exported.read(run / "export/sbr").tables["item_id"], expected_VD, atol=1e-5, rtol=1e-5)
    assert records(run) == records(trained.folder / "1-column_wise")


def selections(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl about selections."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("split") == "selection"]


def valid_ndcg(trained: Trained, run: Path) -> float:
    """NDCG@20 of a bundle on the validation sessions, with its blend."""
    bundle, dataset = load_bundle(run / "export/sbr"), Dataset(trained.folder / "dataset")
    metrics = evaluate_model(bundle.ranking(), dataset, "valid", ONE_RANK, bundle.catalog.train_count_V)
    return float(metrics["ndcg@20"])


@pytest.mark.parametrize(
    ("blend", "size"),
    [
        ((), 1),
        pytest.param((), 2, marks=pytest.mark.slow),
        pytest.param(("item_knn",), 1, marks=pytest.mark.slow),
        (("item_knn", "text_knn"), 2),
    ],
    ids=str,
)
def test_the_strength_that_ranks_best_is_selected(trained: Trained, blend: Neighbors, size: int) -> None:
    quality = {one: valid_ndcg(trained, trained.again([one], blend=blend)) for one in (0.0, STRENGTH, 7.0)}
    best_first = sorted(quality, key=lambda one: quality[one], reverse=True)
    best = best_first[0]
    assert quality[best] > quality[best_first[1]]
    for order in (best_first, best_first[::-1]):
        run = trained.again(order, size, blend=blend)
        found, single = Exported.read(run / "export/sbr"), trained.again([best], blend=blend)
        expected = Exported.read(single / "export/sbr")
        torch.testing.assert_close(found.tables["item_id"], expected.tables["item_id"], atol=1e-6, rtol=1e-5)
        assert load_config(run / "export/sbr/config.yaml").tables.knn_smoothing == [best]
        assert valid_ndcg(trained, run) == pytest.approx(quality[best], abs=1e-9)
        (line,) = selections(run)
        assert line["knn_smoothing"] == best
        assert line["ndcg@20"] == pytest.approx(quality[best], abs=1e-9)


@torch.no_grad()
def test_an_item_without_clicks_comes_within_reach_of_ids(trained: Trained) -> None:
    """Sessions that recommend its neighbor by ids recommend it too, which ids could not tell from others before."""
    bundle = load_bundle(trained.folder / "1-column_wise/export/sbr")
    model, collate = bundle.model, bundle.collate
    assert isinstance(model, SessionRecommender)
    items_VQ = model.item_vectors(collate.item_features(torch.arange(collate.num_items)))
    is_cold_V = trained.catalog.train_count_V == 0
    cosines_VV = cosines(trained.catalog)
    cold = is_cold_V.nonzero().flatten().tolist()
    nearest_C = torch.stack([neighbors(trained.catalog, item, cosines_VV)[0] for item in cold])
    sessions = [[item] for item in (~is_cold_V).nonzero().flatten().tolist()]
    scores_BV = model.queries(collate(raw_sessions(sessions, [0] * len(sessions)))) @ items_VQ.T
    likes_CB = scores_BV[:, nearest_C].T.argsort(dim=1, descending=True)[:, :5]
    cold_BC = scores_BV[:, is_cold_V]
    gains_C = cold_BC.T.gather(1, likes_CB).mean(1) - cold_BC.mean(0)
    assert (gains_C > 0).float().mean() > 0.9


def test_without_words_rows_stay_as_they_were_trained(trained: Trained) -> None:
    bundle = load_bundle(trained.folder / "1-column_wise/export/sbr")
    model, collate = bundle.model, bundle.collate
    assert isinstance(model, SessionRecommender)
    before = {name: table.clone() for name, table in model.state_dict().items()}
    nothing_VV = sparse.csr_array((collate.num_items, collate.num_items), dtype=np.float32)
    id_row_smoothing.KnnSmoothing(model, nothing_VV, trained.catalog.train_count_V, ONE_RANK).apply(STRENGTH)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def later_stage(trained: Trained, strengths: list[float]) -> RunRequest:
    config = config_of(trained.folder, strengths)
    config.behave.epochs = 1
    return RunRequest(config, trained.folder / "dataset", trained.folder / "1-column_wise", "behave", resume=True)


@pytest.mark.parametrize("strengths", [[3.0], [0.0, 3.0]])
def test_a_later_stage_does_not_take_another_strength(trained: Trained, strengths: list[float]) -> None:
    message = f"setting tables.knn_smoothing is {strengths}, but stage sbr in .* was exported with strength 2; give [2]"
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        check_run(later_stage(trained, strengths))


def test_a_later_stage_takes_the_strength_that_was_selected(trained: Trained, tmp_path: Path) -> None:
    request = later_stage(trained, [0.0, STRENGTH])
    run = tmp_path / "run"
    shutil.copytree(request.output, run)
    train_run(replace(request, output=run))
    assert load_config(run / "config.yaml").tables.knn_smoothing == [0.0, STRENGTH]
    assert load_config(run / "export/behave/config.yaml").tables.knn_smoothing == [STRENGTH]
    assert not selections(run)


def test_without_validation_sessions_one_strength_must_be_given(trained: Trained, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(trained.folder / "dataset", dataset)
    edit_manifest(dataset, lambda values: values["num_sessions"].update(valid=0))
    request = RunRequest(config_of(trained.folder, [0.0, 2.0]), dataset, tmp_path / "run", "sbr", resume=False)
    with pytest.raises(UserError, match=r"tables\.knn_smoothing has several values, but .*dataset has no validation"):
        check_run(request)
    check_run(replace(request, config=config_of(trained.folder, [2.0])))
