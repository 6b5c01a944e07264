"""Opening a prepared data set: the manifest is checked against the files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmgr_rec.data.dataset import Dataset, FileEntry, Manifest, load_manifest
from llmgr_rec.errors import UserError
from tests.data.prepare_inputs import edit_manifest, prepare


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A small data set."""
    clicks = [(f"u{u}", f"i{n}", n) for u in range(3) for n in range(5)]
    return prepare(tmp_path, clicks).dataset.path


def test_manifest_survives_the_round_trip(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    assert isinstance(manifest, Manifest)
    assert manifest.to_json() == (dataset / "manifest.json").read_text()
    assert manifest.num_sessions == {"train": 3, "valid": 3, "test": 3}
    assert isinstance(manifest.files["items.parquet"], FileEntry)


def test_parts_and_items(dataset: Path) -> None:
    opened = Dataset(dataset)
    assert opened.parts("valid") == [dataset / "valid" / "part-00000.parquet"]
    assert opened.items_path == dataset / "items.parquet"
    with pytest.raises(ValueError, match="split is 'dev'"):
        opened.parts("dev")


def test_fields_that_have_a_default_may_be_absent(dataset: Path) -> None:
    edit_manifest(dataset, lambda values: (values.pop("cuts"), values.pop("num_clicks"), values.pop("repeats")))
    assert load_manifest(dataset).cuts == {}
    assert load_manifest(dataset).repeats == "allow"


def test_folder_that_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a prepared data set.*llmgr_rec\.prepare"):
        Dataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(format_version=99), "format_version 99"),
        (lambda values: values.pop("num_items"), "num_items"),
        (lambda values: values.update(max_length=-5), "max_length is -5"),
        (lambda values: values.update(repeats="maybe"), "repeats is 'maybe'"),
        (lambda values: values["files"]["items.parquet"].pop("rows"), "rows"),
        (lambda values: values.update(files=[1]), "invalid field"),
    ],
)
def test_manifest_that_does_not_fit(dataset: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_manifest(dataset, change)
    with pytest.raises(UserError, match=message) as caught:
        Dataset(dataset)
    assert "manifest.json" in str(caught.value)


def test_manifest_that_is_no_json(dataset: Path) -> None:
    (dataset / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is not valid JSON"):
        Dataset(dataset)


def test_part_that_is_missing_or_cut(dataset: Path) -> None:
    part = dataset / "test" / "part-00000.parquet"
    content = part.read_bytes()
    part.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"part-00000\.parquet has .* bytes but"):
        Dataset(dataset)
    part.unlink()
    with pytest.raises(UserError, match=r"part-00000\.parquet is missing"):
        Dataset(dataset)


@pytest.mark.parametrize("name", ["train/../../outside.parquet", "/etc/hostname", "train/link.parquet"])
def test_no_file_outside_of_a_data_set_is_opened(dataset: Path, name: str) -> None:
    (dataset.parent / "outside.parquet").write_bytes(b"x")
    (dataset / "train" / "link.parquet").symlink_to(dataset.parent / "outside.parquet")
    edit_manifest(dataset, lambda values: values["files"].update({name: values["files"]["items.parquet"]}))
    with pytest.raises(UserError, match=r"is not a file within .*; make or copy the folder again"):
        Dataset(dataset)
