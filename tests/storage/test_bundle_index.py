"""Which bundle of a run is the default one."""

from pathlib import Path

import pytest

from llmgr_rec.config import STAGES
from llmgr_rec.storage.bundle_index import (
    INDEX,
    STAGES_OF_MODEL,
    default_bundle,
    find_bundle,
    latest_bundle,
    model_of_bundle,
    resolve_bundle,
)


def run_with_stages(run: Path, *stages: str) -> Path:
    for stage in stages:
        (run / "export" / stage).mkdir(parents=True)
        (run / "export" / stage / INDEX).touch()
    return run


@pytest.mark.parametrize("last", range(len(STAGES)))
def test_the_bundle_of_the_furthest_stage_is_the_default(tmp_path: Path, last: int) -> None:
    export = run_with_stages(tmp_path, *STAGES[: last + 1]) / "export"
    furthest = export / STAGES[last]
    assert default_bundle(export) == latest_bundle(export) == furthest
    assert resolve_bundle(tmp_path) == resolve_bundle(export) == furthest


def test_a_bundle_is_found_by_its_model(tmp_path: Path) -> None:
    export = run_with_stages(tmp_path, "sbr", "align") / "export"
    found = {model: find_bundle(export, model) for model in STAGES_OF_MODEL}
    assert found == {
        "sbr": export / "sbr",
        "llm_text": None,
        "llmgr": export / "align",
    }
    assert [model_of_bundle(bundle) for bundle in found.values() if bundle] == ["sbr", "llmgr"]


def test_an_incomplete_bundle_is_never_the_default(tmp_path: Path) -> None:
    (tmp_path / "export" / "sbr").mkdir(parents=True)
    assert default_bundle(tmp_path / "export") is None
