"""Shared by the tests of the train command: settings, a finished run, and a command that is refused."""

import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmgr_rec.cli import run_cli
from llmgr_rec.config_file import save_config
from llmgr_rec.distributed.process_group import World
from llmgr_rec.train import main
from tests.ranks import run_on_ranks
from tests.training.small_training import small_config, small_dataset, train


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    """`run_cli` configures the logging of the whole process."""
    logger = logging.getLogger("llmgr_rec")
    before = (logger.level, logger.propagate, logger.handlers)
    yield
    logger.level, logger.propagate, logger.handlers = before


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    config = small_config(folder / "prompts.yaml")
    config.sbr.max_steps = config.align.max_steps = config.behave.max_steps = 3
    config.runtime.eval_every = 0
    config.runtime.checkpoint_every = 2
    save_config(config, folder / "small.yaml")
    return folder / "small.yaml"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, settings: Path) -> Path:
    """A run of all stages. Not to be written to."""
    run = tmp_path_factory.mktemp("finished") / "run"
    run_on_ranks(finish, 1, str(settings), str(run), str(small_dataset()))
    return run


def finish(world: World, settings: str, run: str, dataset: str) -> None:
    from llmgr_rec.config_file import load_config

    Path(run).mkdir()
    shutil.copy(settings, Path(run, "config.yaml"))
    train(world, load_config(settings), Path(run), Path(dataset))


class Refused:
    """Runs the command and returns the one line that it gives as its reason."""

    def __init__(self, settings: Path, folder: Path, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch):
        self.settings, self.folder, self._capsys, self._patch = settings, folder, capsys, patch
        self.output = folder / "run"

    def __call__(self, *words: str, **options: str | Path | None) -> str:
        given = {"config": self.settings, "dataset": small_dataset(), "output": self.output, **options}
        before = contents(self.folder)
        argv = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
        self._patch.setattr(sys, "argv", ["train", *argv, *words])
        with pytest.raises(SystemExit) as stop:
            run_cli(main)
        said = self._capsys.readouterr()
        assert stop.value.code == 2, said.err
        assert said.out == ""
        assert said.err.count("\n") == 1, said.err
        assert said.err.startswith("error: ")
        assert contents(self.folder) == before, "something was written"
        return said.err.removeprefix("error: ").rstrip("\n")


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture
def refused(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return Refused(settings, tmp_path, capsys, monkeypatch)
