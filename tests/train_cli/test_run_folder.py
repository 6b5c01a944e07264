"""The train command: run folders that it refuses, in one line, and leaves as they are."""

import errno
import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from llmgr_rec.distributed.process_group import World
from llmgr_rec.folder_lock import LOCK_NAME
from llmgr_rec.train import main
from llmgr_rec.training.preflight import RunRequest
from llmgr_rec.training.train_run import _locked
from llmgr_rec.training.training_record import TrainingRecord
from tests.json_files import edit_json
from tests.train_cli.conftest import Refused
from tests.training.damage import (
    agree,
    edit_manifest,
    of_another_catalog,
)
from tests.training.small_training import small_dataset


def test_a_folder_that_is_no_run_is_left_locked(refused: Refused, tmp_path: Path) -> None:
    refused.output.mkdir()
    (refused.output / "notes.txt").write_text("mine")
    assert re.search(r"output folder .*run is not empty and .* training run; give another --output", refused())
    assert re.search(r"run/notes\.txt is a file; give", refused(output=refused.output / "notes.txt"))
    assert re.search(r"run/notes\.txt is a file; give", refused(output=refused.output / "notes.txt" / "run"))


def test_a_folder_that_cannot_be_written_to_is_refused(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked by name, because root may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != refused.folder)
    assert re.search(rf"{refused.folder} is not writable; give another --output", refused())


def test_a_resumed_run_has_a_name(refused: Refused) -> None:
    assert re.search("--resume .*; .*--output", refused("--resume", output=None))


def test_a_resumed_run_goes_on_with_its_data_set(
    refused: Refused,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It once went on with synthetic sessions, which the catalog of the run refused."""
    shutil.copytree(finished, refused.output)
    with TrainingRecord(refused.output, "llm", small_dataset(), 0, World.alone()):
        pass
    asked: list[RunRequest] = []
    monkeypatch.setattr("llmgr_rec.training.train_run.train_run", lambda request: asked.append(request) or [])
    main(["--resume", "--output", str(refused.output)])
    main(["--resume", "--output", str(refused.output), "--dataset", "moved"])
    assert [request.dataset for request in asked] == [small_dataset().absolute(), Path("moved")]
    capsys.readouterr()
    (refused.output / "training.json").unlink()
    assert re.search(r"run does not say which data set .*; give it with --dataset", refused("--resume", dataset=None))
    assert re.search(r"no run in .*absent to resume", refused("--resume", output=tmp_path / "absent", dataset=None))
    assert re.search("--init_from .*; give it with --dataset", refused(init_from=finished, output=None, dataset=None))


def test_a_run_is_not_begun_again(refused: Refused, finished: Path) -> None:
    shutil.copytree(finished, refused.output)
    assert re.search(r"stage sbr of .* is .*complete.*; give another --output, or --resume", refused())
    assert re.search(r"stage align of .* is .*complete", refused(stage="align"))
    shutil.rmtree(refused.output / "export")
    assert re.search(r"/run .* a run.*; add --resume", refused())
    assert re.search(r"/run .* a run.*; add --resume", refused(stage="sbr"))


def test_stages_keep_their_order(refused: Refused, finished: Path) -> None:
    nothing = r"stage align \w.* from stage sbr, which is not complete in .*run; train it first with --stage sbr$"
    assert re.search(nothing, refused(stage="align"))
    assert re.search(r"stage behave \w.* from stage align", refused(stage="behave"))
    shutil.copytree(finished, refused.output)
    for name in ("export", "checkpoints"):
        shutil.rmtree(refused.output / name / "behave")
        shutil.rmtree(refused.output / name / "align")
    skip = r"from stage align, which is not complete in .*--stage align, or .* with --align\.epochs 0"
    assert re.search(skip, refused(stage="behave"))
    shutil.rmtree(refused.output / "export" / "sbr")
    assert re.search(nothing, refused("--resume", stage="align"))
    shutil.copytree(finished / "export" / "behave", refused.output / "export" / "behave")
    assert re.search(r"stage sbr \w.* stage behave, which is complete.*; give another --output", refused("--resume"))


def begun(run: Path, finished: Path, done: Sequence[str], started: Sequence[str] = ()) -> None:
    """A copy of a run in which some stages are complete and some have checkpoints only."""
    run.mkdir()
    shutil.copy(finished / "config.yaml", run)
    for stage in done:
        shutil.copytree(finished / "export" / stage, run / "export" / stage)
    for stage in (*done, *started):
        shutil.copytree(finished / "checkpoints" / stage, run / "checkpoints" / stage)


@pytest.mark.parametrize(
    ("done", "started", "words", "message"),
    [
        ([], ["sbr"], ["--sbr.lr", "0.5"], r"setting sbr\.lr is 0\.5, but checkpoint .*step-00000003 was made with"),
        ([], ["sbr"], ["--tables.dim", "32"], r"setting tables\.dim is 32, but checkpoint"),
        (["sbr"], ["align"], ["--align.lr", "0.5"], r"setting align\.lr is 0\.5, but checkpoint"),
        (["sbr"], [], ["--sbr.epochs", "9"], r"setting sbr\.epochs is 9, but stage sbr of .* is complete with \d"),
        (["sbr"], [], ["--tables.dim", "32"], r"setting tables\.dim is 32, but stage sbr in .* was trained with 16"),
        (["sbr"], [], ["--encoder.name", "srgnn"], r"encoder\.name is srgnn, but stage sbr in .* trained with gcsan"),
        (["sbr", "align"], [], ["--llm.lora_rank", "4"], r"llm\.lora_rank is 4, but stage align in .* trained with 2"),
        (["sbr", "align"], [], ["--head.name", "linear"], r"head\.name is linear, but stage align"),
        (
            ["sbr", "align"],
            [],
            ["--head.separate_loss", "true"],
            r"head\.separate_loss is True, but stage align .* trained with False",
        ),
        (
            ["sbr", "align"],
            [],
            ["--llm_text.epochs", "1", "--align.epochs", "0", "--behave.epochs", "0"],
            r"stage llm_text .* from stage sbr, but stage align is complete in .*; give another --output",
        ),
    ],
)
def test_a_run_goes_on_with_its_own_settings(
    refused: Refused, finished: Path, done: list[str], started: list[str], words: list[str], message: str
) -> None:
    begun(refused.output, finished, done, started)
    assert re.search(message, refused("--resume", *words))


def test_a_run_of_an_experiment_with_controls_is_not_continued_without(refused: Refused, finished: Path) -> None:
    begun(refused.output, finished, ["sbr"], ["align"])
    edit_json(refused.output / "export/sbr/bundle.json", lambda index: index.update(factory="shuffled_words"))
    assert re.search(r"stage sbr in .* with controls shuffled_words; give another --output", refused("--resume"))
    edit_json(refused.output / "export/sbr/bundle.json", lambda index: index.update(factory=""))
    state = refused.output / "checkpoints/align/steps/step-00000003/state.json"
    edit_json(state, lambda content: content["identity"].update(factory="no_graph"))
    assert re.search(r"checkpoint .*step-00000003 was made with no_graph controls", refused("--resume"))


def test_a_run_that_another_process_trains_is_left_locked(refused: Refused, finished: Path) -> None:
    begun(refused.output, finished, ["sbr"], [])
    with FileLock(refused.output / LOCK_NAME):
        assert "another process is training in" in refused("--resume")


def test_storage_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(lock: FileLock) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    monkeypatch.setattr(logging.getLogger("llmgr_rec"), "propagate", True)
    with _locked(tmp_path / "run", World.alone()):
        assert (tmp_path / "run").is_dir()
    assert "cannot be locked ([Errno 37] No locks available)" in caplog.text


@pytest.fixture(scope="session")
def other_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many items as the small data set has, of other names."""
    dataset = tmp_path_factory.mktemp("other") / "dataset"
    shutil.copytree(small_dataset(), dataset)
    of_another_catalog(dataset)
    from llmgr_rec.data.catalog import Catalog

    edit_manifest(dataset, lambda manifest: manifest.update(catalog_hash=Catalog.load(dataset).hash))
    return dataset


@pytest.mark.parametrize("done", [[], ["sbr"], ["sbr", "align"]])
def test_a_run_of_another_catalog_is_refused(
    refused: Refused, finished: Path, other_dataset: Path, done: list[str]
) -> None:
    started = [] if done else ["sbr"]
    begun(refused.output, finished, done, started)
    where = r"checkpoint .*step-00000003 belongs to" if started else rf"export/{done[-1]} was trained on"
    assert re.search(rf"{where} another catalog .*; give the data set", refused("--resume", dataset=other_dataset))


@pytest.mark.parametrize("done", [["sbr"], ["sbr", "align", "behave"]])
def test_a_run_of_other_training_sessions_is_refused(
    refused: Refused, finished: Path, tmp_path: Path, done: list[str]
) -> None:
    begun(refused.output, finished, done, [])
    shutil.copytree(small_dataset(), tmp_path / "later")
    edit_manifest(tmp_path / "later", lambda manifest: manifest["files"]["train/part-00000.parquet"].update(sha256="x"))
    expected = rf"export/{done[-1]} was trained on other sessions than those in .*later/train; give the data set"
    assert re.search(expected, refused("--resume", dataset=tmp_path / "later"))


@pytest.mark.parametrize("done", [[], ["sbr"]])
def test_a_run_whose_words_were_numbered_otherwise_is_refused(
    refused: Refused, finished: Path, tmp_path: Path, done: list[str]
) -> None:
    begun(refused.output, finished, done, [] if done else ["sbr"])
    dataset = tmp_path / "renumbered"
    shutil.copytree(small_dataset(), dataset)
    table = pq.read_table(dataset / "items.parquet")
    column = table.schema.get_field_index("category_ids")
    pq.write_table(
        table.set_column(column, "category_ids", table["category_ids"].take(pa.array(range(table.num_rows)[::-1]))),
        dataset / "items.parquet",
    )
    agree(dataset, "items.parquet")
    where = (
        r"export/sbr was trained on the same items with other words"
        if done
        else r"checkpoint .* another catalog \(other items, words"
    )
    assert re.search(where, refused("--resume", dataset=dataset))


def test_a_damaged_checkpoint_is_refused(refused: Refused, finished: Path) -> None:
    begun(refused.output, finished, [], ["sbr"])
    newest = refused.output / "checkpoints/sbr/steps/step-00000003"
    (newest / "__0_0.distcp").write_bytes(b"abc")
    said = refused("--resume")
    assert re.search(
        r"step-00000003 is not complete: __0_0\.distcp has 3 of \d+ bytes; remove \S+-00000003 to resume", said
    )


def test_a_damaged_export_is_refused(refused: Refused, finished: Path) -> None:
    begun(refused.output, finished, ["sbr"])
    (refused.output / "export/sbr/recommender.safetensors").write_bytes(b"abc")
    assert re.search(r"export/sbr is damaged: recommender\.safetensors has 3 of", refused("--resume"))
