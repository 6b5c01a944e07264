"""One flipped bit anywhere in a bundle or a data set is found when the file is read; sums of earlier versions, too."""

import shutil
from pathlib import Path

import pytest

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.errors import UserError
from llmgr_rec.storage.bundle import load_bundle, load_weights
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.storage.bundle_index import read_config, read_index
from tests.json_files import edit_json, remove_checksums
from tests.small_run import ONE_RANK, config, run_with, small_run


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_flipped_bit_in_a_bundle_is_found(tmp_path: Path) -> None:
    bundle = run_with(tmp_path / "run", "behave") / "export" / "behave"
    load_bundle(bundle)
    for file in files_of(bundle):
        # Only other programs read it.
        if file.name == "adapter_config.json":
            continue
        before = file.read_bytes()
        flip_bit(file)
        with pytest.raises(UserError, match=rf"^{file} is damaged[: ]") as caught:
            load_bundle(bundle)
        assert "\n" not in str(caught.value)
        file.write_bytes(before)
    flip_bit(bundle / "config.yaml")
    with pytest.raises(UserError, match=r"config\.yaml is damaged: its checksum is xxh3-128:"):
        read_config(bundle)


def test_a_flipped_bit_in_a_table_of_an_earlier_version_is_found(tmp_path: Path) -> None:
    bundle = run_with(tmp_path / "run", "sbr") / "export" / "sbr"
    edit_json(bundle / "bundle.json", remove_checksums)
    load_bundle(bundle)
    file = bundle / read_index(bundle).table_files["item_id"][0].file
    flip_bit(file)
    with pytest.raises(
        UserError, match=rf"{file} is damaged: its checksum is [0-9a-f]{{64}}, recorded was [0-9a-f]{{64}}"
    ):
        load_bundle(bundle)


def test_damage_of_a_table_is_found_in_the_bundle_of_the_next_stage(tmp_path: Path) -> None:
    export = run_with(tmp_path / "run", "sbr") / "export"
    bundle = load_bundle(export / "sbr")
    file = read_index(export / "sbr").table_files["item_id"][0].file
    flip_bit(export / "sbr" / file)
    export_bundle(bundle.model, "align", config(), bundle.catalog, export / "align", ONE_RANK)
    assert (export / "align" / file).samefile(export / "sbr" / file)
    with pytest.raises(UserError, match=rf"^{export}/align/{file} is damaged: its checksum is"):
        load_weights(bundle.model, export / "align")


@pytest.mark.parametrize("former", [False, True])
def test_a_flipped_bit_in_a_data_set_is_found(tmp_path: Path, former: bool) -> None:
    shutil.copytree(small_run().dataset.path, tmp_path / "dataset")
    if former:
        edit_json(tmp_path / "dataset" / "manifest.json", remove_checksums)
    dataset = Dataset(tmp_path / "dataset")
    for split in ("train", "valid", "test"):
        flip_bit(dataset.parts(split)[0])
        with pytest.raises(UserError, match=rf"{split}/part-00000\.parquet is damaged: .*; prepare the data set again"):
            dataset.parts(split)
    Catalog.of(dataset)
    flip_bit(dataset.items_path)
    with pytest.raises(UserError, match=r"items\.parquet is damaged"):
        Catalog.of(dataset)
