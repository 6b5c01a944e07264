"""Stage sbr draws rare items' id rows towards those of like words: on one rank and on two, and anew where asked."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llmgr_rec.config import Config
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.distributed.assembly import make_collator
from llmgr_rec.distributed.bundle import load_bundle
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.text_neighbours import texts_to_compare, tf_idf
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
    config.tables.neighbour_clicks = clicks
    return config


def train_case(world: World, folder: str, name: str, sharding: str, clicks: float, resume: bool) -> None:
    config = config_of(Path(folder), clicks)
    config.tables.sharding = sharding  # type: ignore[assignment]
    # Several ranges of rows.
    rare_rows._LOOKUP_ITEMS = 64
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
        """Exports stage sbr of the run on one rank anew, from its last checkpoint."""
        name = f"again-{clicks}-{size}-{sharding}"
        if (self.folder / name).exists():
            return self.folder / name
        shutil.copytree(self.folder / "1-column_wise", self.folder / name)
        shutil.rmtree(self.folder / name / "export/sbr")
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


def trained_rows(trained: Trained) -> Tensor:
    """The id rows before anything is drawn."""
    return Exported.read(trained.again(0.0) / "export/sbr").tables["item_id"]


def neighbours(catalogue: Catalogue, item: int, cosines_VV: Tensor) -> Tensor:
    """The trained items that share the most telling words with an item, nearest first."""
    cosines_V = cosines_VV[item].where(catalogue.train_count_V > 0, 0.0)
    cosines_V[item] = 0.0
    order_V = cosines_V.argsort(descending=True, stable=True)
    return order_V[cosines_V[order_V] > 0][:NEIGHBOURS]


def cosines(catalogue: Catalogue) -> Tensor:
    words_VT = torch.from_numpy(tf_idf(texts_to_compare(catalogue)).T.toarray())
    # As the neighbours are kept, so that ties are ties.
    return (functional.normalize(words_VT, dim=1) @ functional.normalize(words_VT, dim=1).T).float()


def plain_rows(own_VD: Tensor, catalogue: Catalogue, clicks: float) -> Tensor:
    """The id rows as the documentation says them, item by item."""
    cosines_VV = cosines(catalogue)
    rows = []
    for item, count in enumerate(catalogue.train_count_V.tolist()):
        nearest_N = neighbours(catalogue, item, cosines_VV)
        squared_N = cosines_VV[item, nearest_N] ** 2
        mean_D = squared_N @ own_VD[nearest_N] / squared_N.sum()
        rows.append((count * own_VD[item] + clicks * mean_D) / (count + clicks) if len(nearest_N) else own_VD[item])
    return torch.stack(rows)


@pytest.mark.parametrize(("size", "sharding"), [(1, "column_wise"), (2, "column_wise"), (2, "table_wise")])
def test_rows_are_exported_as_documented(trained: Trained, size: int, sharding: str) -> None:
    expected_VD = plain_rows(trained_rows(trained), trained.catalogue, CLICKS)
    found_VD = Exported.read(trained.folder / f"{size}-{sharding}" / "export/sbr").tables["item_id"]
    torch.testing.assert_close(found_VD, expected_VD, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found_VD, trained_rows(trained), atol=1e-2)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_ranks_compute_what_one_does(trained: Trained, sharding: str) -> None:
    one, two = trained.folder / "1-column_wise", trained.folder / f"2-{sharding}"
    assert numbers(two) == pytest.approx(numbers(one), abs=1e-5)
    # From the same checkpoint, so that ranks differ in how they draw rows alone.
    again = Exported.read(trained.again(CLICKS, 2, sharding) / "export/sbr").tables
    first = Exported.read(one / "export/sbr").tables
    torch.testing.assert_close(again["item_id"], first["item_id"], atol=1e-6, rtol=1e-5)


def test_a_trained_stage_takes_another_number_without_training(trained: Trained) -> None:
    run = trained.again(7.0)
    expected_VD = plain_rows(trained_rows(trained), trained.catalogue, 7.0)
    torch.testing.assert_close(Exported.read(run / "export/sbr").tables["item_id"], expected_VD, atol=1e-5, rtol=1e-5)
    assert records(run) == records(trained.folder / "1-column_wise")


@torch.no_grad()
def test_an_item_without_clicks_comes_within_reach_of_ids(trained: Trained) -> None:
    """Sessions that recommend its neighbour by ids recommend it too, which ids could not tell from others before."""
    bundle = load_bundle(trained.folder / "1-column_wise/export/sbr")
    model, collate = bundle.model, make_collator(bundle.config, bundle.catalogue, "rank", language=False)
    items_VQ = model.item_vectors(collate.item_features(torch.arange(collate.num_items)))
    is_cold_V = trained.catalogue.train_count_V == 0
    cosines_VV = cosines(trained.catalogue)
    cold = is_cold_V.nonzero().flatten().tolist()
    nearest_C = torch.stack([neighbours(trained.catalogue, item, cosines_VV)[0] for item in cold])
    sessions = [[item] for item in (~is_cold_V).nonzero().flatten().tolist()]
    scores_BV = model.queries(collate(raw_sessions(sessions, [0] * len(sessions)))) @ items_VQ.T
    likes_CB = scores_BV[:, nearest_C].T.argsort(dim=1, descending=True)[:, :5]
    cold_BC = scores_BV[:, is_cold_V]
    gains_C = cold_BC.T.gather(1, likes_CB).mean(1) - cold_BC.mean(0)
    assert (gains_C > 0).float().mean() > 0.9


def test_a_later_stage_does_not_take_another_number(trained: Trained) -> None:
    config = config_of(trained.folder, 3.0)
    config.behave.epochs = 1
    request = RunRequest(config, trained.folder / "dataset", trained.folder / "1-column_wise", "behave", resume=True)
    with pytest.raises(UserError, match=r"setting tables\.neighbour_clicks is 3\.0, but stage sbr in .* with 2\.0"):
        check_run(request)


@pytest.mark.parametrize(("clicks", "message"), [(-1.0, "-1.0; give 0 or more"), (float("nan"), "nan; give a finite")])
def test_a_mistake_in_the_setting_is_named(clicks: float, message: str) -> None:
    config = Config()
    config.tables.neighbour_clicks = clicks
    with pytest.raises(UserError, match=f"setting tables.neighbour_clicks is {message}"):
        check_limits(config)
