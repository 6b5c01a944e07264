"""The Python API ranks as `score` does, takes what users hold, and changes nothing of the process."""

import functools
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from llmgr_rec import Recommender, UserError, python_api
from llmgr_rec.score import main as score
from llmgr_rec.scoring import session_ranker
from tests.small_run import small_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rec() -> Recommender:
    return Recommender.load(small_run().run)


@pytest.fixture(scope="module")
def sessions(rec: Recommender) -> list[list[Any]]:
    """Sessions of all lengths up to beyond the model's maximum, with unknown items, repeats, and none."""
    generator = np.random.default_rng(0)
    ids = rec.item_ids.to_pylist()
    made = [[ids[place] for place in generator.integers(len(ids), size=size)] for size in (1, 2, 3, 7, 60, 5)]
    unknown: Any = -7 if isinstance(ids[0], int) else "no such item"
    return [*made, [unknown, ids[3], ids[3]], [unknown], []]


def test_ranks_as_score_does(rec: Recommender, sessions: list[list[Any]], tmp_path: Path) -> None:
    pq.write_table(pa.table({"session_id": range(len(sessions)), "items": sessions}), tmp_path / "in.parquet")
    score(
        [
            "--run",
            str(small_run().run),
            "--input",
            str(tmp_path / "in.parquet"),
            "--output",
            str(tmp_path / "out"),
            "--k",
            "7",
        ]
    )
    expected = pq.read_table(tmp_path / "out").to_pydict()
    found = rec.recommend(sessions, k=7).to_pydict()
    assert found["item_ids"] == expected["item_ids"]
    assert found["fallback"] == expected["fallback"]
    for left, right in zip(found["scores"], expected["scores"], strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5)


def test_titles_stand_beside_ids(rec: Recommender, sessions: list[list[Any]]) -> None:
    titles = dict(zip(rec.item_ids.to_pylist(), rec.titles.to_pylist(), strict=True))
    for row in rec.recommend(sessions, k=3).to_pylist():
        assert row["titles"] == [titles[item] for item in row["item_ids"]]
        assert len(row["item_ids"]) == len(row["scores"]) == 3


def test_takes_what_users_hold(rec: Recommender, sessions: list[list[Any]], tmp_path: Path) -> None:
    expected = rec.recommend(sessions[:6], k=4)
    table = pa.table({"session_id": pa.array(range(6)), "items": sessions[:6]})
    pq.write_table(table, tmp_path / "sessions.parquet")
    clicks = [(session, item) for session, items in enumerate(sessions[:6]) for item in items]
    log = {"session_id": [session for session, _ in clicks], "item_id": [item for _, item in clicks]}
    newest_first = {name: values[::-1] for name, values in log.items()} | {"timestamp": range(len(clicks), 0, -1)}
    forms = (
        table,
        tmp_path / "sessions.parquet",
        str(tmp_path / "sessions.parquet"),
        table.to_pylist(),
        log,
        table.to_batches()[0],
    )
    for form in forms:
        assert rec.recommend(form, k=4).drop_columns("session_id") == expected.drop_columns("session_id"), type(form)
    by_session = {row["session_id"]: row["item_ids"] for row in rec.recommend(newest_first, k=4).to_pylist()}
    assert by_session == dict(enumerate(expected["item_ids"].to_pylist()))


class DataFrame:
    """What pandas and polars data frames have in common: the Arrow PyCapsule protocol."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)


def test_takes_data_frames(rec: Recommender, sessions: list[list[Any]]) -> None:
    frame = DataFrame(pa.table({"session_id": range(6), "items": sessions[:6]}))
    assert rec.recommend(frame, k=4)["item_ids"] == rec.recommend(sessions[:6], k=4)["item_ids"]


def test_restricts_what_is_recommended(rec: Recommender, sessions: list[list[Any]]) -> None:
    num_items = len(rec.item_ids)
    complete = rec.recommend(sessions, k=num_items, exclude_seen=False).to_pylist()
    assert rec.recommend(sessions, k=10**15, exclude_seen=False).to_pylist() == complete
    chosen = set(rec.item_ids.to_pylist()[5:20])
    for options in (
        {"among": chosen},
        {"without": set(rec.item_ids.to_pylist()) - chosen},
        {"among": [*chosen, chosen.copy().pop()]},
    ):
        found = rec.recommend(sessions, k=num_items, exclude_seen=False, **options).to_pylist()
        for row, all_items in zip(found, complete, strict=True):
            assert row["item_ids"] == [item for item in all_items["item_ids"] if item in chosen]
    assert rec.recommend(sessions, among=[])["item_ids"].to_pylist() == [[]] * len(sessions)
    assert rec.recommend([], among=chosen).num_rows == 0
    for row, items in zip(
        rec.recommend(sessions, k=num_items, exclude_seen=True, among=chosen).to_pylist(), sessions, strict=True
    ):
        if not row["fallback"]:
            assert set(row["item_ids"]) == chosen - set(items[-50:])


def test_sessions_of_several_batches_get_the_same_lists(
    rec: Recommender, sessions: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = rec.item_ids.to_pylist()[5:20]
    expected = rec.recommend(sessions, k=4, among=chosen).to_pydict()
    monkeypatch.setattr(session_ranker, "_BATCH", 2)
    found = rec.recommend(sessions, k=4, among=chosen).to_pydict()
    assert [found[name] for name in ("item_ids", "fallback")] == [expected[name] for name in ("item_ids", "fallback")]
    # Rounding depends on the sessions of a batch.
    np.testing.assert_allclose(found["scores"], expected["scores"], rtol=1e-5, atol=1e-5)


def test_similar_items_have_the_most_similar_vectors(rec: Recommender) -> None:
    ids = rec.item_ids.to_pylist()
    found = rec.similar(ids[:5], k=8).to_pylist()
    vectors = rec.ranker._unit_VQ.numpy()
    for place, row in enumerate(found):
        cosines = vectors @ vectors[place]
        cosines[place] = -np.inf
        assert row["item_id"] == ids[place]
        assert ids[place] not in row["item_ids"]
        np.testing.assert_allclose(row["scores"], np.sort(cosines)[::-1][:8], rtol=1e-5)


def _clicks(times: list[Any]) -> dict[str, list[Any]]:
    return {"user_id": [1] * len(times), "item_id": list(range(len(times))), "timestamp": times}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rec: rec.recommend([[1]], k=0), "k is 0"),
        (lambda rec: rec.recommend("no/such.parquet"), "sessions no/such.parquet"),
        (lambda rec: rec.recommend([[1, "a"]]), "must all be integers or all text"),
        (lambda rec: rec.recommend([[1, None]]), "sessions hold 1 null item ids"),
        (lambda rec: rec.recommend([[2**70]]), "must all be integers or all text"),
        (lambda rec: rec.similar([2**70]), "must all be integers or all text"),
        (lambda rec: rec.recommend({"item_id": [1, 2], "user_id": ["u", None]}), "column user_id has 1 nulls"),
        (lambda rec: rec.recommend(_clicks([5.0, float("nan")])), "column timestamp has 1 nulls"),
        (lambda rec: rec.recommend(_clicks(["9", "10"])), "column timestamp is string, but must be numbers"),
        (lambda rec: rec.recommend({"items": [[1], None]}), "column items has 1 nulls"),
        (lambda rec: rec.recommend(small_run().dataset.path / "test"), "items are indices"),
        (lambda rec: Recommender.fit(small_run().dataset.path / "test"), "items are indices"),
        (lambda rec: rec.recommend(["abc"]), "not a list of item ids"),
        (lambda rec: rec.recommend([[1], ""]), "holds '', which is not a list of item ids"),
        (lambda rec: rec.recommend([0, 5]), "holds 0, which is not a list of item ids"),
        (lambda rec: rec.recommend([None]), "holds None, which is not a list of item ids"),
        (lambda rec: rec.recommend(3), "sessions is int; give a pandas"),
        (lambda rec: rec.recommend({"item": [1]}), "no column items"),
        (lambda rec: rec.recommend({"item_id": [1]}), "neither session_id nor user_id"),
        (lambda rec: rec.recommend([rec.item_ids.to_pylist()[:1]], category="no such"), "no item has the category"),
        (lambda rec: rec.recommend([], without="abc"), "give a list of item ids"),
        (lambda rec: rec.similar([10**9 if pa.types.is_int64(rec.item_ids.type) else "none"]), "is not in the catalog"),
        (lambda rec: rec.evaluate(), "Recommender.load"),
        (lambda rec: rec.save(small_run().run), "not an empty folder"),
        (lambda rec: Recommender.load("no/such/run"), "does not exist"),
    ],
)
def test_a_mistake_is_one_line(rec: Recommender, call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        call(rec)
    assert "\n" not in str(raised.value)


def test_several_threads_and_models_at_once(rec: Recommender, sessions: list[list[Any]], tmp_path: Path) -> None:
    rec.save(tmp_path / "saved")
    second = Recommender.load(tmp_path / "saved")
    expected = [rec.recommend([session], k=5) for session in sessions]
    failures: list[int] = []

    def ask(number: int) -> None:
        model = (rec, second)[number % 2]
        for session, answer in zip(sessions, expected, strict=True):
            if model.recommend([session], k=5) != answer:
                failures.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures


def test_changes_nothing_of_the_process(sessions: list[list[Any]]) -> None:
    before = (dict(os.environ), torch.get_num_threads(), torch.initial_seed(), torch.is_grad_enabled())
    Recommender.load(small_run().run).recommend(sessions)
    assert (dict(os.environ), torch.get_num_threads(), torch.initial_seed(), torch.is_grad_enabled()) == before
    assert not dist.is_initialized()


def test_the_documented_lines_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = ["pen", "ink", "paper", "brush", "paint", "canvas", "easel", "clay", "glaze", "kiln"]
    starts = np.random.default_rng(0).integers(len(items), size=120)
    log = {
        "user_id": np.repeat(np.arange(120), 6),
        "item_id": [items[(start + step) % len(items)] for start in starts for step in range(6)],
        "timestamp": np.tile(np.arange(6), 120) + 1_600_000_000,
    }
    pq.write_table(pa.table(log), tmp_path / "interactions.parquet")
    pq.write_table(pa.table({"item_id": items, "title": [f"a {item}" for item in items]}), tmp_path / "items.parquet")
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    # A few epochs are enough for a log in which each item has one successor.
    fit = functools.partial(Recommender.fit, settings={"sbr.epochs": 3, "tables.dim": 16, "runtime.device": "cpu"})
    monkeypatch.setattr(Recommender, "fit", fit)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(snippet, names)
    (row,) = names["ranked"].to_pylist()
    assert row["item_ids"][0] == "paper"
    assert row["titles"][0] == "a paper"
    assert "clay" not in row["item_ids"]


def test_fits_lists_without_items_in_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []

    def run(command: str, options: dict[str, Any]) -> None:
        commands.append(command)
        if command == "prepare":
            assert pq.read_table(options["items"]).to_pydict() == {"item_id": [5, 7, 9], "title": [None] * 3}
            assert pq.read_table(options["sessions"])["items"].to_pylist() == [[5, 7], [7, 9]]
        else:
            shutil.copytree(small_run().run, options["output"])

    monkeypatch.setattr(python_api, "run_command", run)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fitted = Recommender.fit([[5, 7], [7, 9]])
    assert commands == ["prepare", "train"]
    assert len(list(tmp_path.iterdir())) == 1
    del fitted
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_session_recommender_loads_no_package_of_language_models() -> None:
    code = f"""
import sys
from llmgr_rec import Recommender
rec = Recommender.load({str(small_run().run / "export" / "sbr")!r})
rec.recommend([rec.item_ids.to_pylist()[:2]])
print(*({{"peft", "transformers", "duckdb", "matplotlib"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_a_failed_fit_says_what_the_command_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^prepare failed: .*timestamp"):
        Recommender.fit({"user_id": [1], "item_id": [2]}, output=tmp_path / "run")
