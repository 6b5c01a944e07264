"""`encoder.one_pass`: `auto` is true where encoder and training rows allow it, and true is refused elsewhere."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from llmgr_rec.data.dataset import Dataset
from llmgr_rec.errors import UserError
from llmgr_rec.training.preflight import RunRequest, check_run
from tests.training.small_training import small_config, small_dataset

STEPS = "with encoder.steps 2 the node states of gcsan depend on later clicks"


@pytest.fixture
def of_prefixes(tmp_path: Path) -> Path:
    """The small data set, described as one whose rows are prefixes."""
    folder = tmp_path / "prefixes"
    shutil.copytree(small_dataset(), folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "prefix_augmentation": [], "checksum": None}))
    return folder


@pytest.mark.parametrize(
    ("settings", "whole", "problem"),
    [
        ({}, True, ""),
        ({"name": "sasrec", "steps": 2}, True, ""),
        ({"steps": 2}, True, STEPS),
        ({"name": "stamp"}, True, "encoder stamp does not support it"),
        ({}, False, "the training rows of FOLDER are already prefixes"),
    ],
)
def test_auto_is_true_where_true_is_accepted(
    tmp_path: Path,
    of_prefixes: Path,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, object],
    whole: bool,
    problem: str,
) -> None:
    dataset = small_dataset() if whole else of_prefixes
    problem = problem.replace("FOLDER", str(dataset))
    config = small_config(tmp_path / "prompts.yaml")
    config.behave.epochs = 0

    def checked(one_pass: bool | str) -> bool | str:
        config.encoder = replace(config.encoder, **{**settings, "one_pass": one_pass})  # type: ignore[arg-type]
        return check_run(RunRequest(config, dataset, tmp_path / "run", "all", False)).config.encoder.one_pass

    with caplog.at_level(logging.INFO):
        assert checked("auto") is (not problem)
    said = f"false, because {problem}" if problem else "true"
    assert f"sbr: encoder.one_pass auto is {said}" in caplog.messages
    assert checked(False) is False
    if not problem:
        assert checked(True) is True
        return
    with pytest.raises(UserError) as error:
        checked(True)
    assert str(error.value) == f"setting encoder.one_pass is true, but {problem}; set encoder.one_pass to auto or false"


def test_prompts_of_rows_that_are_prefixes_are_not_in_one_pass(tmp_path: Path, of_prefixes: Path) -> None:
    config = small_config(tmp_path / "prompts.yaml")
    config.prompt.templates, config.prompt.one_pass = "compact", True
    assert Dataset(of_prefixes).manifest.prefix_augmentation == []
    with pytest.raises(
        UserError, match=r"prompt\.one_pass is true, but the training rows of .* set prompt\.one_pass to"
    ):
        check_run(RunRequest(config, of_prefixes, tmp_path / "run", "all", False))
