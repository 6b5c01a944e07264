"""A storage that fails in a checkpoint, an export or the log is one line, and nothing half-written is left."""

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.storage.bundle import load_bundle
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.storage.checkpoint import CheckpointManager, Identity
from llmgr_rec.training.metrics_logger import MetricsLogger
from tests.small_run import ONE_RANK, config, small_run

NUMBERS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS]
_open = io.open


class FullFile:
    """A file that fails after a number of bytes."""

    def __init__(self, file: Any, room: int, number: int) -> None:
        self._file, self._room, self._number = file, room, number

    def write(self, data: Any) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(self._number, os.strerror(self._number))
        return self._file.write(data)

    def __enter__(self) -> "FullFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def fill(monkeypatch: pytest.MonkeyPatch, name: str, room: int, number: int) -> None:
    """Lets writes to files of a name fail after a number of bytes."""

    def limited(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = _open(path, mode, *args, **options)
        return FullFile(file, room, number) if path.name == name and mode[0] in "wa" else file

    monkeypatch.setattr(Path, "open", limited)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("name", "room"), [("__0_0.distcp", 0), ("__0_0.distcp", 700), (".metadata.tmp", 10)])
def test_a_checkpoint_that_fails_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, room: int, number: int
) -> None:
    manager = CheckpointManager(tmp_path, 2, World.alone(), Identity("sbr", "catalog", {}))
    model = torch.nn.Linear(30, 20)
    manager.save(1, model, None, {"at": 1})
    with monkeypatch.context() as patch:
        fill(patch, name, room, number)
        with pytest.raises(UserError, match=rf"{tmp_path}/step-00000002\.tmp.*: {os.strerror(number)}; "):
            manager.save(2, model, None, {"at": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert manager.load(model, None) == {"at": 1}
    manager.save(2, model, None, {"at": 2})
    assert manager.load(model, None) == {"at": 2}


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle(small_run().run / "export" / "behave")
    export = tmp_path / "export" / "behave"

    def full(tensors: object, path: Path, *_: object, **options: object) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("llmgr_rec.storage.bundle_export.save_file", full)
        with pytest.raises(UserError, match=rf"^{export}\.tmp: No space left on device; free some space"):
            export_bundle(bundle.model, "behave", config(), bundle.catalog, export, ONE_RANK)
    assert not list(export.parent.iterdir())
    export_bundle(bundle.model, "behave", config(), bundle.catalog, export, ONE_RANK)
    load_bundle(export)


def test_the_log_keeps_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLogger(tmp_path, enabled=True)
    log.write("sbr", 1, loss=1.0)
    before = (tmp_path / "metrics.jsonl").read_text()
    with monkeypatch.context() as patch:
        fill(patch, "metrics.jsonl", 5, errno.ENOSPC)
        with pytest.raises(UserError, match=rf"^{tmp_path}/metrics\.jsonl: No space left on device"):
            log.write("sbr", 2, loss=1.0)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    log.write("sbr", 2, loss=1.0)
    log.close()
