"""Which bundle of a run is the default one, and that an index names no file outside of its bundle."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmgr_rec.config import STAGES
from llmgr_rec.errors import UserError
from llmgr_rec.storage.bundle_index import (
    INDEX,
    STAGES_OF_MODEL,
    default_bundle,
    find_bundle,
    latest_bundle,
    model_of_bundle,
    read_index,
    resolve_bundle,
)
from tests.json_files import edit_json
from tests.small_run import run_with


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


# Changes the index of a bundle, or the bundle.
Change = Callable[[dict[str, Any], Path], object]


def _name_table(name: str) -> Change:
    return lambda index, _: index["table_files"]["item_id"][0].update(file=name)


def _name_file(name: str) -> Change:
    return lambda index, bundle: index["files"].update({name: (bundle / name).stat().st_size})


def _link_out(name: str) -> Change:
    def link(_: dict[str, Any], bundle: Path) -> None:
        shutil.move(bundle / name, bundle.parent / "moved")
        (bundle / name).symlink_to(bundle.parent / "moved")

    return link


@pytest.mark.parametrize(
    "change",
    [
        _name_table("../outside.safetensors"),
        _name_table("/etc/hostname"),
        _name_table("tables/\0"),
        _name_file("../outside.safetensors"),
        _name_file("/etc/hostname"),
        _link_out("recommender.safetensors"),
        _link_out("config.yaml"),
        _link_out("tables"),
    ],
)
def test_no_file_outside_of_a_bundle_is_opened(
    tmp_path: Path, change: Callable[[dict[str, Any], Path], object]
) -> None:
    bundle = run_with(tmp_path / "run", "sbr") / "export" / "sbr"
    (bundle.parent / "outside.safetensors").write_bytes(b"not of the bundle")
    edit_json(bundle / INDEX, lambda index: change(index, bundle))
    with pytest.raises(UserError, match=r"is not a file within .*sbr; make or copy the folder again") as error:
        read_index(bundle)
    assert "\n" not in str(error.value)


def test_a_bundle_may_be_reached_through_a_link(tmp_path: Path) -> None:
    bundle = run_with(tmp_path / "run", "sbr") / "export" / "sbr"
    (tmp_path / "link").symlink_to(bundle)
    assert read_index(tmp_path / "link").stage == "sbr"
