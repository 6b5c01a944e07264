"""Commands on remote storage give what they give on this machine, also when they are killed at any write."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from llmgr_rec import Recommender
from llmgr_rec.config import TablesConfig
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.files import INCOMPLETE, publish_folder
from llmgr_rec.folder_lock import LOCK_NAME
from llmgr_rec.remote_path import as_path
from llmgr_rec.scoring import score_run as scoring_run
from llmgr_rec.scoring.input import Part
from llmgr_rec.scoring.output import ScoreFolder
from llmgr_rec.scoring.score_run import score_run
from llmgr_rec.storage.bundle import load_bundle
from llmgr_rec.storage.bundle_index import is_complete
from llmgr_rec.storage.checkpoint import CheckpointManager
from tests.commands import main_of
from tests.distributed.small_model import shard_list
from tests.ranks import run_on_ranks
from tests.remote.object_store import Killed, ObjectStore, dies_at, register
from tests.scoring.sessions import all_bytes, raw_sessions, write_sessions
from tests.scoring.test_output import run as write_scores
from tests.scoring.test_score_run import request
from tests.small_run import small_run, write_log
from tests.storage.test_checkpoint import IDENTITY, build, train

BUCKET = "objects://bucket"
TRAINING = {
    "config": "default", "sbr.epochs": "1", "sbr.batch_size": "64", "tables.dim": "16", "runtime.device": "cpu",
    "runtime.reader_workers": "0", "runtime.checkpoint_every": "2",
}  # fmt: skip


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder of the objects of `BUCKET`. Copies and drafts of this machine go to another one, and none is left."""
    monkeypatch.setenv("LLMGR_TEST_OBJECTS", "")
    monkeypatch.setenv("LLMGR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "objects" / "bucket").mkdir(parents=True)
    register(tmp_path / "objects")
    yield tmp_path / "objects" / "bucket"
    ObjectStore.failure = None


def run(command: str, **options: object) -> None:
    words = [word for name, value in options.items() for word in (f"--{name}", str(value)) if word]
    main_of(f"llmgr_rec.{command}")(words)


def prepare(source: str, output: str) -> None:
    files = {"interactions": f"{source}/interactions.parquet", "items": f"{source}/items.parquet"}
    run("prepare", **files, output=output, min_interactions=0, threads=1)


def without_lock(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in all_bytes(folder).items() if name != LOCK_NAME}


def test_commands_write_the_same_bytes_as_on_this_machine(bucket: Path, tmp_path: Path) -> None:
    write_log(tmp_path / "raw")
    shutil.copytree(tmp_path / "raw", bucket / "raw")
    shutil.copytree(small_run().run, bucket / "run")
    for where in (str(tmp_path), BUCKET):
        prepare(f"{where}/raw", f"{where}/dataset")
        run("score", run=f"{where}/run" if where == BUCKET else small_run().run, input=f"{where}/dataset/test",
            output=f"{where}/scores", part_rows=20)  # fmt: skip
        run("export", run=small_run().run, output=f"{where}/smaller", table_dtype="int8", stage="sbr")
    for folder in ("dataset", "scores", "smaller"):
        assert all_bytes(bucket / folder) == all_bytes(tmp_path / folder)
    run("evaluate", run=f"{BUCKET}/run", dataset=f"{BUCKET}/dataset", output=f"{BUCKET}/metrics.json", models="sbr")
    run("report", run=f"{BUCKET}/run", metrics=f"{BUCKET}/metrics.json", output=f"{BUCKET}/report")
    assert (bucket / "report" / "index.html").is_file()
    with pytest.raises(UserError, match="objects://bucket/dataset exists and is not an empty folder"):
        prepare(f"{BUCKET}/raw", f"{BUCKET}/dataset")
    assert not list((tmp_path / "cache" / "remote" / "drafts").iterdir())


def test_a_remote_run_is_trained_resumed_saved_and_extended(
    bucket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small_run().dataset.path, bucket / "dataset")
    with dies_at(25), pytest.raises(Killed):
        run("train", dataset=f"{BUCKET}/dataset", output=f"{BUCKET}/run", **TRAINING)
    assert list(bucket.glob("run/checkpoints/sbr/steps/*/COMPLETE"))
    assert not (bucket / "run/export/sbr/bundle.json").exists()
    run("train", dataset=f"{BUCKET}/dataset", output=f"{BUCKET}/run", resume="")
    steps = [line for line in (bucket / "run" / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert len(steps) == len(set(steps))
    assert load_bundle(f"{BUCKET}/run").stage == "sbr"
    assert "trained sbr" in capsys.readouterr().out
    recommender = Recommender.load(f"{BUCKET}/run")
    expected = recommender.recommend([["i1", "i2"]])
    recommender.save(f"{BUCKET}/saved")
    recommender.extend(write_log(tmp_path)[1], output=f"{BUCKET}/extended")
    for name in ("saved", "extended"):
        found = Recommender.load_once(f"{BUCKET}/{name}").recommend([["i1", "i2"]])
        assert found["item_ids"] == expected["item_ids"]
    assert not list(bucket.rglob(INCOMPLETE))


def test_a_command_whose_lock_was_taken_ends_before_it_writes(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(small_run().dataset.path / "test", bucket / "sessions")
    lock, write, taken = bucket / "scores" / LOCK_NAME, ScoreFolder.write, '{"writer": "1-00000000-1", "renewals": 7}'

    def write_second(folder: ScoreFolder, part: Part, *values: Any, **named: Any) -> None:
        if part.first_row:
            lock.write_text(taken)
        write(folder, part, *values, **named)

    monkeypatch.setattr(ScoreFolder, "write", write_second)
    with pytest.raises(UserError, match=r"scores/\.lock was removed, or taken by another process .*run the same"):
        run("score", run=small_run().run, input=f"{BUCKET}/sessions", output=f"{BUCKET}/scores", part_rows=20)
    assert lock.read_text() == taken
    assert [file.name for file in lock.parent.glob("*.parquet")] == ["part-00000.parquet"]
    assert not (lock.parent / "_SUCCESS").exists()


def ends_with_the_same_bytes(bucket: Path, work: Callable[[str], object], marker: str) -> int:
    """Kills `work` at each change of the storage, and lets it run again; returns the number of changes."""
    with dies_at(0):
        work(f"{BUCKET}/whole")
    changes, expected = ObjectStore.changes, without_lock(bucket / "whole")
    for change in range(1, changes + 1):
        name = f"killed-{change}"
        with dies_at(change), pytest.raises(Killed):
            work(f"{BUCKET}/{name}")
        if (bucket / name / marker).is_file():
            assert set(without_lock(bucket / name)) >= set(expected)
        # It may have been complete when the process was killed.
        with suppress(UserError):
            work(f"{BUCKET}/{name}")
        found = without_lock(bucket / name)
        found.pop(INCOMPLETE, None)
        assert found == expected, change
    return changes


def test_scores_killed_at_any_write_end_with_the_same_bytes(bucket: Path) -> None:
    assert ends_with_the_same_bytes(bucket, lambda output: write_scores(as_path(output)), "_SUCCESS") >= 6


@pytest.mark.slow
def test_scoring_killed_at_any_write_ends_with_the_same_bytes(bucket: Path, tmp_path: Path) -> None:
    shutil.copyfile(write_sessions(tmp_path / "in.parquet", raw_sessions(30)), bucket / "in.parquet")
    source = as_path(f"{BUCKET}/in.parquet")
    work = lambda output: score_run(request(source, as_path(output), part_rows=15))  # noqa: E731
    assert ends_with_the_same_bytes(bucket, work, "_SUCCESS") >= 6


def test_a_folder_killed_at_any_write_ends_with_the_same_bytes(bucket: Path, tmp_path: Path) -> None:
    # A run whose bundle of the last stage is uploaded last is no run before.
    for name in ("a", "export/align/bundle.json", "export/behave/bundle.json"):
        (tmp_path / "draft" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "draft" / name).write_text(name)
    marker = "export/behave/bundle.json"

    def publish(output: str) -> None:
        assert is_complete(as_path(f"{output}/export/align")) == as_path(f"{output}/{marker}").is_file()
        publish_folder(tmp_path / "draft", as_path(output), marker)

    assert ends_with_the_same_bytes(bucket, publish, marker) == 5
    assert all(is_complete(as_path(f"{BUCKET}/killed-{change}/export/align")) for change in range(1, 6))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_training_killed_at_any_write_ends_with_the_same_model(bucket: Path) -> None:
    shutil.copytree(small_run().dataset.path, bucket / "dataset")

    def work(output: str) -> None:
        resume = {"resume": ""} if as_path(f"{output}/config.yaml").exists() else {}
        run("train", dataset=f"{BUCKET}/dataset", output=output, **(resume or TRAINING))

    with dies_at(0):
        work(f"{BUCKET}/whole")
    changes, expected = ObjectStore.changes, all_bytes(bucket / "whole" / "export")
    assert changes > 30
    for change in range(1, changes + 1):
        output = f"killed-{change}"
        with dies_at(change), pytest.raises(Killed):
            work(f"{BUCKET}/{output}")
        work(f"{BUCKET}/{output}")
        found = all_bytes(bucket / output / "export")
        found.pop(f"sbr/{INCOMPLETE}", None)
        assert found == expected, change
        shutil.rmtree(bucket / output)


def on_ranks(world: World, root: str, source: str, output: str, checkpoints: str) -> bool:
    """What each of two machines does: no folder but the bucket is that of both."""
    register(root)
    os.environ["LLMGR_CACHE"] = f"{root}-cache-{world.rank}"
    joined = scoring_run.process_group
    scoring_run.process_group = lambda *_: nullcontext(world)
    try:
        score_run(request(as_path(source), as_path(output), part_rows=5))
    finally:
        scoring_run.process_group = joined
    manager = CheckpointManager(as_path(checkpoints), 1, world, IDENTITY)
    model, optimizer = build(world, TablesConfig(optimizer="adagrad", sharding="table_wise"))
    for step in (1, 2):
        train(model, optimizer, world, range(step, step + 1))
        manager.save(step, model, optimizer)
    before = shard_list(model)
    train(model, optimizer, world, range(2, 3))
    manager.load(model, optimizer)
    return all(torch.equal(one[-1], other[-1]) for one, other in zip(before, shard_list(model), strict=True))


@pytest.mark.slow
@pytest.mark.dist
def test_two_machines_write_to_one_remote_folder(bucket: Path, tmp_path: Path) -> None:
    shutil.copyfile(write_sessions(tmp_path / "in.parquet", raw_sessions(25)), bucket / "in.parquet")
    urls = [f"{BUCKET}/{name}" for name in ("in.parquet", "two", "checkpoints")]
    assert run_on_ranks(on_ranks, 2, str(bucket.parent), *urls) == [True, True]
    score_run(request(bucket / "in.parquet", tmp_path / "one", part_rows=5))
    assert all_bytes(bucket / "two") == all_bytes(tmp_path / "one")
    files = {path.name for path in (bucket / "checkpoints").rglob("*.distcp")}
    assert files == {"__0_0.distcp", "__1_0.distcp"}
    assert [path.name for path in (bucket / "checkpoints").iterdir()] == ["step-00000002"]
