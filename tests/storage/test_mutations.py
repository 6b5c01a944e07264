"""Damaged index files give one line that names the file, or the content as it was; never another exception.

With checksums, no change of the content passes. Without, as in files of earlier versions, a changed value may pass if
it has a valid type, but nothing else may happen.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmgr_rec.config_file import load_config
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.results import read_metrics, write_metrics
from llmgr_rec.experiments.trial import Trial
from llmgr_rec.index_files import CHECKSUM
from llmgr_rec.storage.bundle import open_bundle
from llmgr_rec.storage.bundle_index import INDEX
from llmgr_rec.storage.checkpoint import CheckpointManager, Identity
from tests.json_files import edit_json, remove_checksums
from tests.mutations import mutate
from tests.small_run import run_with, small_run

FILES = ["manifest.json", "items.parquet", INDEX, "config.yaml", "bundle items.parquet", "run config.yaml"]
FILES += ["state.json", ".metadata", "metrics.json", "trial.npz"]
# Mutations of each file in the default run and in the slow one.
FEW, MANY = 10, 200

Opened = Callable[[str], tuple[Path, Callable[[], object]]]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    """The file of a name in a folder of its own, and what reads it."""

    def dataset(name: str) -> tuple[Path, Callable[[], object]]:
        shutil.copytree(small_run().dataset.path, tmp_path / "dataset")
        return tmp_path / "dataset" / name, lambda: Catalog.of(Dataset(tmp_path / "dataset"))

    def bundle(name: str) -> tuple[Path, Callable[[], object]]:
        folder = run_with(tmp_path / "run", "behave") / "export" / "behave"
        return folder / name, lambda: open_bundle(folder)

    def checkpoint(name: str) -> tuple[Path, Callable[[], object]]:
        manager = CheckpointManager(tmp_path / "steps", 1, World.alone(), Identity("sbr", "catalog", {"seed": 0}))
        model = torch.nn.Linear(3, 2)
        manager.save(1, model, None, {"position": {"step": 1}})
        return tmp_path / "steps" / "step-00000001" / name, lambda: manager.load(model, None)

    def metrics(name: str) -> tuple[Path, Callable[[], object]]:
        write_metrics(tmp_path / name, {"test": {"sbr": {"hr@20": 0.5}}, "count": 2})
        return tmp_path / name, lambda: read_metrics(tmp_path / name)

    def run_config(name: str) -> tuple[Path, Callable[[], object]]:
        file = run_with(tmp_path / "run") / "config.yaml"
        return file, lambda: load_config(file)

    def trial(name: str) -> tuple[Path, Callable[[], object]]:
        Trial(np.arange(300, dtype=np.int32), 0.25, {"item_knn": 0.5}, 3.0).save(tmp_path / name)
        return tmp_path / name, lambda: Trial.load(tmp_path / name)

    makers: dict[str, Opened] = {
        "manifest.json": dataset,
        "items.parquet": dataset,
        INDEX: bundle,
        "config.yaml": bundle,
        "bundle items.parquet": bundle,
        "run config.yaml": run_config,
        "state.json": checkpoint,
        ".metadata": checkpoint,
        "metrics.json": metrics,
        "trial.npz": trial,
    }
    return lambda name: makers[name](name.split()[-1])


def outcomes(file: Path, read: Callable[[], object], count: int, same: Callable[[bytes], bool]) -> dict[str, int]:
    """How often each outcome came of reading damaged copies of a file; fails where it is not a line or a result."""
    content = file.read_bytes()
    found = {"line": 0, "read": 0, "silent": 0}
    for seed in range(count):
        damaged = mutate(content, seed)
        file.write_bytes(damaged)
        line = refusal(read)
        if line is None:
            found["read" if same(damaged) else "silent"] += 1
        else:
            assert "\n" not in line, f"mutation {seed}: {line}"
            assert str(file.parent) in line, f"mutation {seed} does not name the file: {line}"
            found["line"] += 1
    file.write_bytes(content)
    return found


def refusal(read: Callable[[], object]) -> str | None:
    """The line by which a file is refused; None if it is read."""
    try:
        read()
    except UserError as error:
        return str(error)
    return None


def without_checksums(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a file like those of earlier versions."""
    for module in ("data.dataset", "storage.bundle_index"):
        monkeypatch.setattr(f"llmgr_rec.{module}.verify_file", lambda *_: None)
    index = file.with_name("state.json") if file.name == ".metadata" else file
    if index.suffix == ".json":
        edit_json(index, remove_checksums)


def without_own_checksum(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != CHECKSUM}


def check(file: Path, read: Callable[[], object], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    has_checksum = file.name not in ("metrics.json", "trial.npz") and file.parent.name != "run"
    content = file.read_bytes()

    def same(damaged: bytes) -> bool:
        """Whether the values are those of before."""
        if file.suffix != ".json":
            return damaged == content
        return without_own_checksum(json.loads(damaged)) == without_own_checksum(json.loads(content))

    read()
    found = outcomes(file, read, count, same)
    assert not has_checksum or not found["silent"], found
    without_checksums(file, monkeypatch)
    read()
    outcomes(file, read, count, same)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_index_file_is_one_line(name: str, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    file, read = opened(name)
    check(file, read, FEW, monkeypatch)


@pytest.mark.parametrize("name", ["manifest.json", INDEX, "state.json"])
def test_an_index_file_may_lack_its_checksum_only_if_it_has_no_other(name: str, opened: Opened) -> None:
    file, read = opened(name)
    values = json.loads(file.read_text())
    file.write_text(json.dumps(without_own_checksum(values)))
    assert "missing field checksum; if you have edited the file, add it with the value null" in str(refusal(read))
    edit_json(file, lambda values: values.update({CHECKSUM: None}))
    assert refusal(read) is None
    edit_json(file, remove_checksums)
    assert refusal(read) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_many_damaged_index_files_are_one_line(name: str, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    file, read = opened(name)
    check(file, read, MANY, monkeypatch)
