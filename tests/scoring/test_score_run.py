"""Scoring jobs: every row, in order, right, and the same after any interruption."""

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from llmgr_rec.distributed.process_group import World, barrier
from llmgr_rec.errors import UserError
from llmgr_rec.folder_lock import FolderLock
from llmgr_rec.scoring import score_run as scoring_run
from llmgr_rec.scoring.input import InputFile, Part
from llmgr_rec.scoring.output import ScoreFolder
from llmgr_rec.scoring.score_run import ScoreRequest, score_run
from llmgr_rec.scoring.scorer import share_of_rank
from llmgr_rec.storage.bundle import Bundle, load_bundle
from tests.json_files import edit_json
from tests.modules.small_llmgr import raw_sessions as as_raw
from tests.ranks import run_on_ranks
from tests.scoring.sessions import all_bytes, raw_sessions, read_scores, write_sessions
from tests.sharded_bundles import sharded_bundles
from tests.small_run import NUM_ITEMS, run_with, small_run


def request(source: Path, output: Path, **options: Any) -> ScoreRequest:
    return ScoreRequest(**{"run": small_run().run, "stage": "sbr", "input": source, "output": output, **options})


@cache
@torch.no_grad()
def loaded(stage: str) -> tuple[Bundle, torch.Tensor]:
    """A shared model with the vectors of all its items."""
    bundle = load_bundle(small_run().run / "export" / stage)
    return bundle, bundle.model.item_vectors(bundle.collate.item_features(torch.arange(NUM_ITEMS)))


@torch.no_grad()
def reference(stage: str, session: list[str], k: int, max_length: int, repeats: str) -> tuple[list[str], Any]:
    """Ranks one session alone; None where it has no known click."""
    bundle, items = loaded(stage)
    ids = bundle.catalog.item_ids.to_pylist()
    clicks = [ids.index(item) for item in session if item in ids]
    if not clicks:
        counts = bundle.catalog.train_count_V.numpy()
        order = np.argsort(-counts, kind="stable")[:k]
        return [ids[item] for item in order], counts[order] / counts.sum()
    batch = bundle.collate(as_raw([clicks[-max_length:]], [-1]))
    scores = (bundle.ranking().queries(batch) @ items.T)[0].numpy()
    if repeats == "exclude":
        scores[clicks[-max_length:]] = -np.inf
    order = [item for item in np.argsort(-scores, kind="stable")[:k] if scores[item] > -np.inf]
    return [ids[item] for item in order], scores[order]


@pytest.mark.parametrize(
    ("stage", "k", "repeats", "max_length"),
    [("sbr", 5, "allow", 50), ("sbr", 58, "exclude", 3), ("behave", 5, "exclude", 4)],
)
def test_each_row_gets_what_ranking_it_alone_gives(tmp_path, stage, k, repeats, max_length):
    sessions = raw_sessions(40)
    sessions[6] = sessions[6] * 5
    source = write_sessions(tmp_path / "in.parquet", sessions, weight=np.arange(40.0))
    options = {"stage": stage, "k": k, "repeats": repeats, "max_length": max_length, "part_rows": 11}
    totals = score_run(request(source, tmp_path / "out", columns=["weight"], **options))
    rows = read_scores(tmp_path / "out")
    assert [row["session_id"] for row in rows] == [f"in-{number}" for number in range(40)]
    assert [row["weight"] for row in rows] == list(range(40))
    known = set(small_run().catalog.item_ids.to_pylist())
    for session, row in zip(sessions, rows, strict=True):
        items, scores = reference(stage, session, k, max_length, repeats)
        assert row["item_ids"] == items
        np.testing.assert_allclose(row["scores"], scores, rtol=1e-4, atol=1e-5)
        assert row["fallback"] == (not known & set(session))
    assert totals.rows_in == totals.rows_out == 40
    assert totals.unknown_items == 8
    assert totals.fallback_rows == sum(not known & set(session) for session in sessions) > 0
    assert totals.parts == 4
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_text()) == vars(totals)


def test_a_list_is_as_long_as_the_catalog_however_many_items_are_asked_for(tmp_path):
    source = write_sessions(tmp_path / "in.parquet", [["i1"], []])
    score_run(request(source, tmp_path / "out", k=1_000_000_000, repeats="allow"))
    assert [len(row["item_ids"]) for row in read_scores(tmp_path / "out")] == [NUM_ITEMS, NUM_ITEMS]


@pytest.mark.parametrize(
    ("option", "recorded", "rule"),
    [
        ({}, {"repeats": "exclude", "max_length": 3}, ("exclude", 3)),
        ({"repeats": "auto", "max_length": 2}, {"repeats": "allow", "max_length": 3}, ("allow", 2)),
        ({"repeats": "allow"}, {"repeats": "exclude", "max_length": 3}, ("allow", 3)),
        ({"repeats": "exclude"}, {}, ("exclude", 50)),
        # Bundles of version 0.2, and of before.
        ({}, {"clicks_repeat": False}, ("exclude", 50)),
        ({}, {"clicks_repeat": True}, ("allow", 50)),
        ({}, {}, ("allow", 50)),
    ],
)
def test_the_bundle_says_what_a_ranking_shows_and_excludes_unless_asked(tmp_path, option, recorded, rule):
    run = run_with(tmp_path / "run", "sbr")

    def record(content: dict[str, Any]) -> None:
        for name in ("repeats", "max_length", "consecutive_repeats"):
            del content[name]
        content.update(recorded)

    edit_json(run / "export" / "sbr" / "bundle.json", record)
    sessions = raw_sessions(20)
    source = write_sessions(tmp_path / "in.parquet", sessions)
    score_run(request(source, tmp_path / "out", run=run, k=40, **option))
    for session, row in zip(sessions, read_scores(tmp_path / "out"), strict=True):
        assert row["item_ids"] == reference("sbr", session, 40, rule[1], rule[0])[0]
    settings = json.loads((tmp_path / "out" / "_manifest.json").read_text())["settings"]
    assert (settings["repeats"], settings["max_length"]) == rule


def test_files_and_parts_have_stable_names_and_lose_no_row(tmp_path):
    sizes = {"b.parquet": 20, "a/x.parquet": 13, "a/y.parquet": 0, "_old/z.parquet": 5, ".hidden.parquet": 5}
    for name, size in sizes.items():
        write_sessions(tmp_path / "in" / name, raw_sessions(size))
    score_run(request(tmp_path / "in", tmp_path / "out", part_rows=10))
    expected = [f"x-{row}" for row in range(13)] + [f"b-{row}" for row in range(20)]
    assert [row["session_id"] for row in read_scores(tmp_path / "out")] == expected
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "_SUCCESS",
        "_manifest.json",
        *(f"part-{number:05d}.parquet" for number in range(4)),
    ]
    rows = [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "out").glob("part-*"))]
    assert rows == [10, 3, 10, 10]


def test_a_split_of_the_data_set_is_scored_by_index(tmp_path):
    shared = small_run()
    score_run(request(shared.dataset.path / "test", tmp_path / "split", columns=["target"]))
    parts = pq.read_table(shared.dataset.parts("test"))
    ids = shared.catalog.item_ids.to_pylist()
    raw = [[ids[item] for item in session] for session in parts["items"].to_pylist()]
    score_run(request(write_sessions(tmp_path / "raw.parquet", raw), tmp_path / "raw"))
    by_index, by_id = read_scores(tmp_path / "split"), read_scores(tmp_path / "raw")
    assert [row["target"] for row in by_index] == parts["target"].to_pylist()
    assert [row["session_id"] for row in by_index] == parts["session_id"].to_pylist()
    assert [(row["item_ids"], row["scores"]) for row in by_index] == [(row["item_ids"], row["scores"]) for row in by_id]


def test_an_interrupted_job_ends_with_the_same_bytes(tmp_path, monkeypatch):
    source = write_sessions(tmp_path / "in.parquet", raw_sessions(60))
    whole, broken = (request(source, tmp_path / name, part_rows=10) for name in ("whole", "broken"))
    score_run(whole)
    write = ScoreFolder.write

    def fail_late(folder: ScoreFolder, part: Any, *values: Any, **counts: Any) -> None:
        if part.name == "part-00003.parquet":
            (folder.path / f".{part.name}.tmp").write_bytes(b"half")
            raise OSError("disk full")
        write(folder, part, *values, **counts)

    monkeypatch.setattr(ScoreFolder, "write", fail_late)
    with pytest.raises(OSError, match="disk full"):
        score_run(broken)
    assert not (broken.output / "_SUCCESS").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in broken.output.glob("part-*")}
    assert sorted(finished) == [f"part-{number:05d}.parquet" for number in range(3)]
    monkeypatch.setattr(ScoreFolder, "write", write)
    score_run(broken)
    assert all_bytes(whole.output) == all_bytes(broken.output)
    for name, written in finished.items():
        assert (broken.output / name).stat().st_mtime_ns == written


def test_ranks_share_the_rows_of_a_job(tmp_path):
    file = InputFile(tmp_path, "in", (), has_indices=False, partitions={})
    parts = [Part(f"{number}", file, 0, rows) for number, rows in enumerate([10, 10, 10, 10, 10, 3, 10, 10, 7])]
    shares = [share_of_rank(parts, replace(World.alone(), rank=rank, size=3)) for rank in range(3)]
    assert [part for share in shares for part in share] == parts
    assert [sum(part.rows for part in share) for share in shares] == [30, 23, 27]
    assert share_of_rank(parts[:1], replace(World.alone(), rank=1, size=3)) == parts[:1]


def test_a_complete_job_is_not_done_again(tmp_path, monkeypatch):
    job = request(write_sessions(tmp_path / "in.parquet", raw_sessions(9)), tmp_path / "out")
    first = score_run(job)
    before = all_bytes(job.output)
    monkeypatch.setattr(scoring_run, "load_model", lambda *_: pytest.fail("nothing was left to score"))
    assert score_run(job) == first
    assert all_bytes(job.output) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 7}, r"settings \(k was 20, is 7\)"),
        ({"part_rows": 5}, r"settings \(part_rows was 16384, is 5\)"),
        ({"columns": ["extra"]}, "settings"),
        ({"stage": "behave"}, r"model \(stage was sbr, is behave\)"),
    ],
)
def test_a_folder_of_another_job_is_refused(tmp_path, change, message):
    source = write_sessions(tmp_path / "in.parquet", raw_sessions(9), extra=list(range(9)))
    score_run(request(source, tmp_path / "out"))
    before = all_bytes(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        score_run(request(source, tmp_path / "out", **change))
    assert all_bytes(tmp_path / "out") == before


def test_lists_that_exceed_the_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring_run, "LIST_ITEM_BYTES", 2**40)
    source = write_sessions(tmp_path / "in.parquet", raw_sessions(9))
    with pytest.raises(
        UserError, match=r"lists of 20 items \(--k\) for 9 sessions of a part need \d+ GiB.* lower --part"
    ):
        score_run(request(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_changed_input_and_changed_model_are_refused(tmp_path):
    run = run_with(tmp_path / "run", "sbr")
    source = write_sessions(tmp_path / "in.parquet", raw_sessions(9))
    score_run(request(source, tmp_path / "out", run=run))
    index = run / "export" / "sbr" / "bundle.json"
    content = index.read_text()
    index.write_text(content + "\n")
    with pytest.raises(UserError, match=r"another job, which differs in model \(sha256"):
        score_run(request(source, tmp_path / "out", run=run))
    index.write_text(content)
    write_sessions(source, raw_sessions(9, seed=1))
    with pytest.raises(UserError, match="another job, which differs in input"):
        score_run(request(source, tmp_path / "out", run=run))


def test_damaged_and_foreign_parts_are_reported(tmp_path):
    job = request(write_sessions(tmp_path / "in.parquet", raw_sessions(9)), tmp_path / "out", part_rows=5)
    score_run(job)
    part = job.output / "part-00001.parquet"
    content = part.read_bytes()
    part.write_bytes(content[:100])
    with pytest.raises(UserError, match=r"part-00001\.parquet is not readable; delete it"):
        score_run(job)
    part.unlink()
    score_run(job)
    assert part.read_bytes() == content
    (job.output / "part-00002.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"part-00002\.parquet is not a part of this scoring job"):
        score_run(job)


ON_RANKS = {"stage": "behave", "part_rows": 10, "k": 5, "batch_size": 3, "repeats": "exclude"}


def scored_on_ranks(world: World, source: Path, output: Path, sharded: Path) -> None:
    # A process group exists already here, as it does not under torchrun.
    joined = scoring_run.process_group
    scoring_run.process_group = lambda *_: nullcontext(world)
    lock = FolderLock(output, "scoring")
    try:
        if world.rank == 0:
            output.mkdir()
            lock.acquire()
        barrier(world)
        with pytest.raises(UserError, match="another process is scoring"):
            score_run(request(source, output, **ON_RANKS))
        lock.release()
        score_run(request(source, output, **ON_RANKS))
        with sharded_bundles():
            score_run(request(source, sharded, **ON_RANKS))
    finally:
        scoring_run.process_group = joined


@pytest.mark.dist
def test_two_ranks_score_as_one(tmp_path):
    source = write_sessions(tmp_path / "in.parquet", raw_sessions(25))
    run_on_ranks(scored_on_ranks, 2, source, tmp_path / "two", tmp_path / "sharded")
    score_run(request(source, tmp_path / "one", **ON_RANKS))
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "two"), "ranks with the whole model take whole parts"
    one, two = read_scores(tmp_path / "one"), read_scores(tmp_path / "sharded")
    assert [row["item_ids"] for row in one] == [row["item_ids"] for row in two]
    for ours, theirs in zip(one, two, strict=True):
        np.testing.assert_allclose(ours["scores"], theirs["scores"], rtol=1e-5)
