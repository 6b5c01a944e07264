"""What version 0.1 wrote is read, or refused in one line that says what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmgr_rec.config import Config
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.examples import scored_examples
from llmgr_rec.scoring.score_run import ScoreRequest, score_run
from llmgr_rec.storage.bundle import load_bundle, open_bundle
from llmgr_rec.storage.bundle_index import read_index
from llmgr_rec.storage.checkpoint import CheckpointManager, Identity
from llmgr_rec.train import parse_arguments
from tests.data.prepare_inputs import edit_manifest
from tests.json_files import edit_json
from tests.scoring.sessions import all_bytes, raw_sessions, write_sessions
from tests.small_run import run_with, small_run


def refused(read: Callable[[], object], folder: Path) -> str:
    """The line that refuses a folder, of which no byte has changed."""
    before = all_bytes(folder)
    with pytest.raises(UserError) as caught:
        read()
    assert all_bytes(folder) == before
    line = str(caught.value)
    assert "\n" not in line
    assert str(folder) in line
    return line


@pytest.mark.parametrize("read", [load_bundle, open_bundle, read_index])
@pytest.mark.parametrize("stage", ["sbr", "behave"])
def test_a_bundle_is_refused(tmp_path: Path, stage: str, read: Callable[[Path], object]) -> None:
    bundle = run_with(tmp_path / "run", stage) / "export" / stage

    def former(index: dict[str, Any]) -> None:
        index["format_version"] = 1
        index["catalogue_hash"] = index.pop("catalog_hash")

    edit_json(bundle / "bundle.json", former)
    # Its settings have names of before, about which nothing is said.
    (bundle / "config.yaml").write_text("prior:\n  neighbours: [item_knn]\n")
    line = refused(lambda: read(bundle), bundle)
    assert line.endswith(
        "bundle.json has format version 1, this version of llmgr_rec reads 2; train the stage again, or use the "
        "version that wrote the bundle"
    )


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_checkpoint_is_refused(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "step-00000003"
    folder.mkdir()
    state = {
        "format": number,
        "step": 3,
        "identity": {"stage": "sbr", "catalogue": "abc", "settings": {"sbr.lr": 0.1}},
        "files": {"__0_0.distcp": 3},
        "extra": {},
    }
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "__0_0.distcp").write_bytes(b"abc")
    (folder / "COMPLETE").touch()
    manager = CheckpointManager(tmp_path, 2, World.alone(), Identity.of("sbr", "abc", Config(), torch.device("cpu")))
    for read in (manager.check, lambda: manager.load(torch.nn.Linear(1, 1), None)):
        line = refused(read, folder)
        assert f"has format {number}, this version reads 5; resume with the version that wrote it, or" in line


def test_a_run_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("tables:\n  item_text: sum\n")
    line = refused(lambda: parse_arguments(["--dataset", "data", "--output", str(tmp_path), "--resume"]), tmp_path)
    assert line.startswith("cannot go on with the settings of the run: unknown setting tables.item_text")
    assert line.endswith("use that version, or give --config and another --output")


@pytest.fixture
def scores(tmp_path: Path) -> tuple[ScoreRequest, Path]:
    """A complete scoring job of the test sessions whose manifest is as version 0.1 wrote it."""
    source = write_sessions(tmp_path / "in" / "a.parquet", raw_sessions(12))
    request = ScoreRequest(run=small_run().run, stage="sbr", input=source, output=tmp_path / "scores")
    score_run(request)

    def former(job: dict[str, Any]) -> None:
        job["version"] = 1
        job["model"]["catalogue"] = job["model"].pop("catalog")
        job["settings"]["governor"] = job["settings"].pop("routing")

    edit_json(tmp_path / "scores" / "_manifest.json", former)
    return request, tmp_path / "scores"


@pytest.mark.parametrize("complete", [True, False])
def test_a_folder_of_scores_is_not_continued(scores: tuple[ScoreRequest, Path], complete: bool) -> None:
    request, folder = scores
    if not complete:
        (folder / "_SUCCESS").unlink()
    line = refused(lambda: score_run(request), folder)
    assert line.endswith("has format version 1, this version of llmgr_rec writes 2; give another --output")


def test_a_folder_of_scores_is_not_shown(scores: tuple[ScoreRequest, Path]) -> None:
    _, folder = scores
    line = refused(lambda: list(scored_examples(folder, small_run().dataset, "test", ["abc"])), folder)
    assert line.endswith("were written by another version of llmgr_rec; score again")


def test_a_data_set_is_read(tmp_path: Path) -> None:
    now = small_run().dataset
    folder = tmp_path / "dataset"
    shutil.copytree(now.path, folder)
    edit_manifest(folder, lambda values: values.update(catalogue_hash=values.pop("catalog_hash")))
    assert "catalog_hash" not in json.loads((folder / "manifest.json").read_text())
    former = Dataset(folder)
    assert former.manifest == now.manifest
    assert len(former.parts("train")) == len(now.parts("train"))


@pytest.mark.parametrize(("clicks_repeat", "repeats"), [(True, "allow"), (False, "exclude")])
def test_a_data_set_of_version_0_2_is_read_with_its_rule(tmp_path: Path, clicks_repeat: bool, repeats: str) -> None:
    folder = tmp_path / "dataset"
    shutil.copytree(small_run().dataset.path, folder)

    def former(values: dict[str, Any]) -> None:
        for name in ("duplicates", "consecutive_repeats", "repeats", "repeats_option", "repeat_counts"):
            del values[name]
        values["clicks_repeat"] = clicks_repeat

    edit_manifest(folder, former)
    manifest = Dataset(folder).manifest
    assert (manifest.repeats, manifest.duplicates, manifest.repeat_counts) == (repeats, "keep", {})
