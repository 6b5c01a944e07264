"""Stage text draws rare items' id rows towards those of like texts: on one rank and on two, and anew where asked."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llmgr_rec.config import Config
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.assembly import make_collator
from llmgr_rec.distributed.bundle import load_bundle
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.limits import check_limits
from llmgr_rec.modules.rare_rows import NEIGHBOURS
from llmgr_rec.recipes import save_config
from llmgr_rec.training import rare_rows
from llmgr_rec.training.checks import RunRequest, check_run
from tests.modules.small_llmgr import raw_sessions
from tests.ranks import run_on_ranks
from tests.training.exported import Exported
from tests.training.small_training import numbers, prepare, records, small_config, train

pytestmark = pytest.mark.dist

SHARDINGS = ("table_wise", "column_wise")
CLICKS = 2.0


def config_of(folder: Path, clicks: float = CLICKS) -> Config:
    config = small_config(folder / "prompts.yaml")
    config.align.epochs = config.behave.epochs = 0
    config.tables.side_features = []
    config.text.epochs, config.text.dim, config.text.neighbour_clicks = 1, 8, clicks
    # As many as tell all items apart.
    config.prompt.max_text_tokens = 24
    return config


def train_case(world: World, folder: str, name: str, sharding: str, clicks: float, resume: bool) -> None:
    config = config_of(Path(folder), clicks)
    config.tables.sharding = sharding  # type: ignore[assignment]
    # Several ranges of neighbours and of rows, so that ranks share them.
    rare_rows._PAIRS, rare_rows._LOOKUP_ITEMS = 200 * 30, 64
    run = Path(folder, name)
    if world.rank == 0:
        run.mkdir(exist_ok=True)
    train(world, config, run, Path(folder, "dataset"), resume)


@dataclass
class Trained:
    folder: Path

    @property
    def catalogue(self) -> Catalogue:
        return Catalogue.load(self.folder / "dataset")

    def again(self, clicks: float, size: int = 1, sharding: str = "column_wise") -> Path:
        """Exports stage text of the run on one rank anew, from its last checkpoint."""
        name = f"again-{clicks}-{size}-{sharding}"
        shutil.copytree(self.folder / "1-column_wise", self.folder / name)
        shutil.rmtree(self.folder / name / "export/text")
        run_on_ranks(train_case, size, str(self.folder), name, sharding, clicks, True)
        return self.folder / name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("rare-rows")
    prepare(folder, sessions=150, items=200, mean_length=4)
    small_config(folder / "prompts.yaml")
    for size, sharding in ((1, "column_wise"), *((2, sharding) for sharding in SHARDINGS)):
        run_on_ranks(train_case, size, str(folder), f"{size}-{sharding}", sharding, CLICKS, False)
        save_config(config_of(folder), folder / f"{size}-{sharding}" / "config.yaml")
    trained = Trained(folder)
    assert 5 < (trained.catalogue.train_count_V == 0).sum() < 100
    return trained


def plain_rows(run: Path, catalogue: Catalogue, clicks: float) -> Tensor:
    """The id rows as the documentation says them, item by item, from what the bundles hold."""
    before, text = Exported.read(run / "export/sbr"), Exported.read(run / "export/text")
    projection_KH = text.recommender["text_tower.items_projection.weight"]
    items_VK = functional.normalize(text.tables["item_text"] @ projection_KH.T, dim=1)
    scale = float(text.recommender["text_tower.log_scale"].exp())
    count_V, own_VD = catalogue.train_count_V, before.tables["item_id"].clone()
    own_VD[count_V == 0] = 0
    rows = []
    for item, count in enumerate(count_V.tolist()):
        cosines_V = (items_VK @ items_VK[item]).where(count_V > 0, -torch.inf)
        cosines_V[item] = -torch.inf
        nearest_N = cosines_V.argsort(descending=True)[:NEIGHBOURS]
        weights_N = (cosines_V[nearest_N] * scale).softmax(0)
        rows.append((count * own_VD[item] + clicks * weights_N @ own_VD[nearest_N]) / (count + clicks))
    return torch.stack(rows)


@pytest.mark.parametrize(("size", "sharding"), [(1, "column_wise"), (2, "column_wise"), (2, "table_wise")])
def test_rows_are_exported_as_documented(trained: Trained, size: int, sharding: str) -> None:
    run = trained.folder / f"{size}-{sharding}"
    expected_VD = plain_rows(run, trained.catalogue, CLICKS)
    sbr, text = (Exported.read(run / "export" / stage) for stage in ("sbr", "text"))
    torch.testing.assert_close(text.tables["item_id"], expected_VD, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(text.tables["item_id"], sbr.tables["item_id"], atol=1e-2)
    for table in sbr.tables.keys() - {"item_id"}:
        assert torch.equal(text.tables[table], sbr.tables[table])


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_ranks_compute_what_one_does(trained: Trained, sharding: str) -> None:
    one, two = trained.folder / "1-column_wise", trained.folder / f"2-{sharding}"
    assert numbers(two) == pytest.approx(numbers(one), abs=1e-5)
    # From the same checkpoint, so that ranks differ in how they draw rows alone.
    again = Exported.read(trained.again(CLICKS, 2, sharding) / "export/text").tables
    first = Exported.read(one / "export/text").tables
    torch.testing.assert_close(again["item_id"], first["item_id"], atol=1e-6, rtol=1e-5)


def test_a_trained_stage_takes_another_number_without_training(trained: Trained) -> None:
    run = trained.again(7.0)
    expected_VD = plain_rows(run, trained.catalogue, 7.0)
    torch.testing.assert_close(Exported.read(run / "export/text").tables["item_id"], expected_VD, atol=1e-5, rtol=1e-5)
    assert records(run) == records(trained.folder / "1-column_wise")


def test_0_leaves_rows_as_they_were_trained(trained: Trained) -> None:
    run = trained.again(0.0)
    sbr, text = (Exported.read(run / "export" / stage).tables["item_id"] for stage in ("sbr", "text"))
    is_cold_V = trained.catalogue.train_count_V == 0
    assert torch.equal(text[~is_cold_V], sbr[~is_cold_V])
    assert not text[is_cold_V].any()


@torch.no_grad()
def test_an_item_without_clicks_comes_within_reach_of_ids(trained: Trained) -> None:
    """Sessions that recommend its neighbour by ids recommend it too, which ids could not tell from others before."""
    bundle = load_bundle(trained.folder / "1-column_wise/export/text")
    model, collate = bundle.model, make_collator(bundle.config, bundle.catalogue, "rank", language=False)
    ids, texts = slice(bundle.config.tables.dim), slice(bundle.config.tables.dim, None)
    items_VQ = model.item_vectors(collate.item_features(torch.arange(collate.num_items)))
    is_cold_V = trained.catalogue.train_count_V == 0
    nearest_C = (items_VQ[is_cold_V, texts] @ items_VQ[:, texts].T).where(~is_cold_V, -torch.inf).argmax(1)
    sessions = [[item] for item in (~is_cold_V).nonzero().flatten().tolist()]
    scores_BV = model.queries(collate(raw_sessions(sessions, [0] * len(sessions))))[:, ids] @ items_VQ[:, ids].T
    likes_CB = scores_BV[:, nearest_C].T.argsort(dim=1, descending=True)[:, :5]
    cold_BC = scores_BV[:, is_cold_V]
    gains_C = cold_BC.T.gather(1, likes_CB).mean(1) - cold_BC.mean(0)
    assert (gains_C > 0).float().mean() > 0.9


def test_a_later_stage_does_not_take_another_number(trained: Trained) -> None:
    config = config_of(trained.folder, 3.0)
    config.behave.epochs = 1
    request = RunRequest(config, trained.folder / "dataset", trained.folder / "1-column_wise", "behave", resume=True)
    with pytest.raises(UserError, match=r"setting text\.neighbour_clicks is 3\.0, but stage text in .* with 2\.0"):
        check_run(request)


def test_items_without_text_are_refused_before_anything_is_trained(trained: Trained, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(trained.folder / "dataset", dataset)
    manifest = json.loads((dataset / "manifest.json").read_text())
    (dataset / "manifest.json").write_text(json.dumps(manifest | {"has_text": False}))
    assert not Dataset(dataset).manifest.has_text
    with pytest.raises(UserError, match="has no titles, and stage text trains on it"):
        check_run(RunRequest(config_of(trained.folder), dataset, tmp_path / "run", "all", resume=False))


@pytest.mark.parametrize(
    ("epochs", "clicks", "message"),
    [
        (1, -1.0, r"setting text\.neighbour_clicks is -1\.0; give 0 or more"),
        (1, float("nan"), r"setting text\.neighbour_clicks is nan; give a finite number"),
        (0, 1.0, r"setting text\.neighbour_clicks is 1\.0, but without a text tower nothing tells"),
    ],
)
def test_a_mistake_in_the_settings_is_named(epochs: int, clicks: float, message: str) -> None:
    config = Config()
    config.text.epochs, config.text.neighbour_clicks = epochs, clicks
    with pytest.raises(UserError, match=message):
        check_limits(config)
