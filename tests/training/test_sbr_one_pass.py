"""Stage sbr with all prefixes of a session in one pass: the steps of one pass per prefix, at any number of ranks."""

import shutil
from pathlib import Path

import pytest

from llmgr_rec.config import Config
from llmgr_rec.distributed.process_group import World
from tests.ranks import run_on_ranks
from tests.training.small_training import numbers, small_config, small_dataset, train

pytestmark = pytest.mark.dist

# Examples of the small data set, and more than a session's clicks.
EXAMPLES, CLICKS = 371, 40
EPOCHS = 3


def whole_epochs(folder: Path, one_pass: bool) -> Config:
    """Steps of all examples, so that both ways take the same ones."""
    config = small_config(folder / "prompts.yaml")
    config.encoder.name, config.encoder.max_clicks = "sasrec", CLICKS
    config.encoder.attention_layers = config.encoder.attention_heads = 2
    config.align.epochs = config.behave.epochs = 0
    config.sbr.epochs, config.encoder.one_pass, config.sbr.batch_size = EPOCHS, one_pass, EXAMPLES
    return config


def train_runs(world: World, folder: str, resumed: bool) -> None:
    for one_pass in (True,) if resumed else (True, False):
        run = Path(folder, f"{world.size}-{one_pass}{'-resumed' if resumed else ''}")
        if world.rank == 0 and not resumed:
            run.mkdir()
        train(world, whole_epochs(Path(folder), one_pass), run, small_dataset_of(folder), resumed)


def small_dataset_of(folder: str) -> Path:
    return Path(folder, "dataset")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one-pass")
    (folder / "dataset").symlink_to(small_dataset())
    small_config(folder / "prompts.yaml")
    for ranks in (1, 2):
        run_on_ranks(train_runs, ranks, str(folder), False)
    return folder


def assert_same(found: Path, expected: Path) -> None:
    one, other = numbers(found), numbers(expected)
    assert one.keys() == other.keys()
    assert sum(name.endswith("/loss") for name in one) == EPOCHS
    worst = max(one, key=lambda name: abs(one[name] - other[name]))
    assert one[worst] == pytest.approx(other[worst], abs=1e-4), worst


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_are_those_of_a_pass_for_each_prefix(trained: Path, ranks: int) -> None:
    assert_same(trained / f"{ranks}-True", trained / f"{ranks}-False")


def test_two_ranks_train_as_one(trained: Path) -> None:
    assert_same(trained / "2-True", trained / "1-True")


def test_a_run_goes_on_from_a_checkpoint_at_another_number_of_ranks(trained: Path) -> None:
    run = trained / "1-True-resumed"
    shutil.copytree(trained / "2-True", run)
    shutil.rmtree(run / "export")
    newest = max((run / "checkpoints" / "sbr" / "steps").iterdir())
    assert newest.name.endswith(f"{EPOCHS:03d}")
    shutil.rmtree(newest)
    run_on_ranks(train_runs, 1, str(trained), True)
    assert_same(run, trained / "1-True")
