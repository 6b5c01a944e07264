"""The Python API ranks as `score` does, takes what users hold, and changes nothing of the process."""

import functools
import gc
import inspect
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmgr_rec import Recommender, UserError, python_api
from llmgr_rec.arrow_input import to_ids
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.score import main as score
from llmgr_rec.scoring import session_ranker
from tests.data.files import write_items
from tests.documented import run_programs
from tests.small_run import run_with, small_run

ROOT = Path(__file__).parents[1]
PATH, IDS = "str | os.PathLike[str]", "collections.abc.Collection[typing.Any]"
OPTIONS = "collections.abc.Mapping[str, object] | None = None"
SIGNATURES = {
    "load": f"(cls, path: {PATH}, *, dataset: {PATH} | None = None, dtype: Optional[Literal['auto', 'float32', "
    "'bfloat16']] = None, index: float | None = None, "
    "table_dtype: Optional[Literal['float32', 'float16', 'int8', 'int4']] = None, "
    "allow_code: collections.abc.Collection[str] = ()) -> 'Recommender'",
    "load_once": f"(cls, path: {PATH}) -> 'Recommender'",
    "fit": "(cls, interactions: object, items: object | None = None, recipe: str = 'default', *, "
    f"settings: {OPTIONS}, preparation: {OPTIONS}, output: {PATH} | None = None, verbose: bool | None = None) "
    "-> 'Recommender'",
    "index_recall": "(self) -> float | None",
    "item_ids": "(self) -> pyarrow.lib.Array",
    "titles": "(self) -> pyarrow.lib.Array",
    "recommend": "(self, sessions: object, k: int = 10, *, exclude_seen: bool | None = None, "
    f"among: {IDS} | None = None, without: {IDS} = (), category: str | None = None, domain: str | None = None, "
    "layout: Literal['lists', 'long'] = 'lists') -> pyarrow.lib.Table",
    "recommend_arrow": "(self, sessions: pyarrow.lib.Table | pyarrow.lib.RecordBatch, k: int = 20, *, "
    "columns: collections.abc.Sequence[str] = ('session_id',), titles: bool = False) -> pyarrow.lib.Table",
    "similar": "(self, items: collections.abc.Sequence[typing.Any], k: int = 10) -> pyarrow.lib.Table",
    "explain": "(self, session: collections.abc.Sequence[typing.Any], k: int = 5, *, "
    "items: collections.abc.Sequence[typing.Any] | None = None, exclude_seen: bool | None = None) "
    "-> llmgr_rec.explanation.records.Explanation",
    "evaluate": "(self, split: str = 'test', **options: object) -> dict[str, typing.Any]",
    "extend": f"(self, items: object, *, output: {PATH} | None = None) -> 'Recommender'",
    "save": f"(self, path: {PATH}) -> None",
}


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


@pytest.mark.parametrize("kind", ["table", "batch", "slices", "nothing"])
def test_arrow_in_arrow_out_as_score_writes(
    rec: Recommender, sessions: list[list[Any]], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"s{row}" for row in range(len(sessions))]
    table = pa.table({"dt": range(len(sessions)), "items": sessions, "session_id": names})
    pq.write_table(table, tmp_path / "in.parquet")
    paths = ["--input", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out")]
    score(["--run", str(small_run().run), *paths, "--columns", "session_id,dt", "--titles"])
    expected = pq.read_table(tmp_path / "out")
    if kind == "slices":
        monkeypatch.setattr(python_api, "_ARROW_ROWS", 4)
    if kind == "nothing":
        table, expected = table.slice(0, 0), expected.slice(0, 0)
    given = table.to_batches()[0] if kind == "batch" else table
    found = rec.recommend_arrow(given, columns=["dt"], titles=True)
    assert found.schema.equals(expected.schema, check_metadata=False)
    assert found.drop(["scores"]).to_pydict() == expected.drop(["scores"]).to_pydict()
    for left, right in zip(found["scores"].to_pylist(), expected["scores"].to_pylist(), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5)


def test_a_process_loads_a_model_once_until_another_is_there(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", "sbr")
    first = Recommender.load_once(run)
    with ThreadPoolExecutor(2) as threads:
        assert set(threads.map(Recommender.load_once, [run, run / "export" / "sbr", str(run)])) == {first}
    os.utime(run / "export" / "sbr" / "bundle.json", (0, 0))
    assert Recommender.load_once(run) is not first


def test_titles_stand_beside_ids(rec: Recommender, sessions: list[list[Any]]) -> None:
    titles = dict(zip(rec.item_ids.to_pylist(), rec.titles.to_pylist(), strict=True))
    for row in rec.recommend(sessions, k=3).to_pylist():
        assert row["titles"] == [titles[item] for item in row["item_ids"]]
        assert len(row["item_ids"]) == len(row["scores"]) == 3


def test_takes_sessions_in_all_forms(rec: Recommender, sessions: list[list[Any]], tmp_path: Path) -> None:
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
        table.to_reader(),
        table["items"],
        table["items"].chunk(0),
        (list(session) for session in sessions[:6]),
        [np.array(session, dtype=object) for session in sessions[:6]],
        np.array([np.array(session, dtype=object) for session in sessions[:6]], dtype=object),
        pd.DataFrame({"items": sessions[:6]}),
        pd.Series(sessions[:6]),
        pl.DataFrame({"session_id": range(6), "items": sessions[:6]}),
        pl.Series(sessions[:6]),
        pl.DataFrame({"items": sessions[:6]}, schema={"items": pl.List(pl.Categorical)}),
    )
    for form in forms:
        assert rec.recommend(form, k=4).drop_columns("session_id") == expected.drop_columns("session_id"), type(form)
    by_session = dict(enumerate(expected["item_ids"].to_pylist()))
    pandas = pd.DataFrame(newest_first)
    times = pd.to_datetime(pandas["timestamp"], unit="s", utc=True).dt.tz_convert("Europe/Berlin")
    tables = (
        newest_first,
        pandas,
        pandas[["timestamp", "item_id", "session_id"]].set_index("session_id"),
        pandas.assign(timestamp=times).astype({"item_id": "category", "session_id": "Int64"}),
        pandas.astype({"item_id": "string", "timestamp": "Float64"}),
        pl.DataFrame(newest_first),
        pl.DataFrame(newest_first).with_columns(pl.col("item_id").cast(pl.Categorical)),
        duckdb.sql("FROM pandas"),
    )
    for held in tables:
        found = rec.recommend(held, k=4)
        assert dict(zip(found["session_id"].to_pylist(), found["item_ids"].to_pylist(), strict=True)) == by_session
    assert rec.recommend(pandas[:0]).num_rows == rec.recommend(pl.DataFrame(newest_first)[:0]).num_rows == 0


def test_takes_numbers_of_all_kinds_as_ids_of_text_and_integers(tmp_path: Path) -> None:
    for ids in ([1, 2, 3], ["1", "2", "3"]):
        catalog = Catalog.load(write_items(tmp_path / type(ids[0]).__name__, 3, item_id=ids))
        for form in ([2], ["2"], [2.0], ["2.0"], np.array([2], np.int32), np.array([2], np.uint64), pd.Series([2])):
            assert catalog.index_of(to_ids(form, "items")).tolist() == [1], (ids, form)


class DataFrame:
    """What pandas and polars data frames have in common: the Arrow PyCapsule protocol."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)


def test_takes_data_frames(rec: Recommender, sessions: list[list[Any]]) -> None:
    frame = DataFrame(pa.table({"session_id": range(6), "items": sessions[:6]}))
    assert rec.recommend(frame, k=4)["item_ids"] == rec.recommend(sessions[:6], k=4)["item_ids"]


def test_the_long_layout_has_a_row_an_item(rec: Recommender, sessions: list[list[Any]]) -> None:
    lists = rec.recommend(sessions, k=3, among=rec.item_ids.to_pylist()[:5], exclude_seen=True)
    expected = [
        {"session_id": row["session_id"], "rank": rank, "item_id": item, "title": title, "score": score}
        | {"fallback": row["fallback"]}
        for row in lists.to_pylist()
        for rank, (item, title, score) in enumerate(
            zip(row["item_ids"], row["titles"], row["scores"], strict=True), start=1
        )
    ]
    long = rec.recommend(sessions, k=3, among=rec.item_ids.to_pylist()[:5], exclude_seen=True, layout="long")
    assert long.to_pylist() == expected
    assert len(expected) < 3 * len(sessions), "no list is shorter, so this checks less"
    assert rec.recommend([], layout="long").num_rows == 0


def test_restricts_what_is_recommended(rec: Recommender, sessions: list[list[Any]]) -> None:
    num_items = len(rec.item_ids)
    complete = rec.recommend(sessions, k=num_items, exclude_seen=False).to_pylist()
    assert rec.recommend(sessions, k=10**15, exclude_seen=False).to_pylist() == complete
    chosen = set(rec.item_ids.to_pylist()[5:20])
    for options in (
        {"among": chosen},
        {"among": np.array(sorted(chosen))},
        {"among": pd.Series(sorted(chosen))},
        {"without": pl.Series([item for item in rec.item_ids.to_pylist() if item not in chosen])},
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


def test_recommends_items_of_a_category(rec: Recommender, sessions: list[list[Any]]) -> None:
    catalog = small_run().catalog
    ids = set(rec.item_ids.filter(pa.array(catalog.in_category("Kind 1"))).to_pylist())
    found = rec.recommend(sessions, k=60, category="Kind 1", exclude_seen=False)["item_ids"].to_pylist()
    assert [set(items) for items in found] == [ids] * len(sessions)


def test_loads_the_output_of_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(small_run().run / "export" / "sbr", tmp_path / "shop" / "run" / "export" / "sbr")
    shutil.copy(small_run().run / "config.yaml", tmp_path / "shop" / "run")
    loaded = Recommender.load(tmp_path / "shop")
    assert repr(loaded).startswith("<Recommender of stage sbr with 60 items from ")
    seen: dict[str, Any] = {}
    monkeypatch.setattr(python_api, "run_command", lambda _, options: seen.update(options))
    with pytest.raises(FileNotFoundError, match=r"metrics\.json"):
        loaded.evaluate()
    assert (seen["run"], seen["dataset"]) == (tmp_path / "shop" / "run", tmp_path / "shop" / "dataset")


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
    vectors = rec.ranker.unit_vectors.numpy()
    for place, row in enumerate(found):
        cosines = vectors @ vectors[place]
        cosines[place] = -np.inf
        assert row["item_id"] == ids[place]
        assert ids[place] not in row["item_ids"]
        np.testing.assert_allclose(row["scores"], np.sort(cosines)[::-1][:8], rtol=1e-5)


def _clicks(times: list[Any]) -> dict[str, list[Any]]:
    return {"user_id": [1] * len(times), "item_id": list(range(len(times))), "timestamp": times}


_FALLBACK = {"items": [[1]], "session_id": [1], "fallback": [True]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rec: rec.recommend([[1]], k=0), "k is 0"),
        (lambda rec: rec.recommend([[1]], k=2.5), "k is 2.5; give an integer"),
        (lambda rec: rec.recommend([[1]], layout="wide"), "layout is 'wide'; give lists or long"),
        (
            lambda rec: rec.recommend_arrow({"items": [[1]], "session": [1]}),
            "no column session_id, did you mean session",
        ),
        (lambda rec: rec.recommend_arrow({"items": [[1]], "session_id": [None]}), "session_id has 1 nulls"),
        (lambda rec: rec.recommend_arrow(_FALLBACK, columns=["fallback"]), "fallback has the name of a column of the"),
        (lambda rec: rec.recommend_arrow(_FALLBACK, columns="dt"), r"columns is 'dt'; give a list of names: \['dt'\]"),
        (lambda rec: rec.similar("abc"), r"items is 'abc'; give a list of item ids: \['abc'\]"),
        (lambda rec: rec.similar(7), r"items is 7; give a list of item ids: \[7\]"),
        (lambda rec: rec.recommend([["a"], [True]]), "must all be integers or all text"),
        (lambda rec: rec.recommend({"items": ["a"]}), "column items is string; give a list"),
        (lambda rec: rec.recommend(pl.DataFrame({"items": [["a"]]}).lazy()), "sessions is LazyFrame; give a pandas"),
        (lambda rec: Recommender.fit({"guest": [1], "dish": [2]}), "need the columns user_id .* they have guest, dish"),
        (lambda rec: Recommender.fit({"user_id": [1], "dish": [2]}), "need the columns user_id .* rename them"),
        (lambda rec: Recommender.fit([["a"]], preparation={"output": "x"}), "preparation has output, which is set"),
        (
            lambda rec: Recommender.fit([["a"]], output=small_run().run.parent),
            "not an empty folder; .*Recommender.load",
        ),
        (lambda rec: rec.recommend([[1, "a"]]), "must all be integers or all text"),
        (lambda rec: rec.recommend([[1, None]]), "sessions hold 1 null item ids"),
        (lambda rec: rec.recommend([[2**70]]), "must all be integers or all text"),
        (lambda rec: rec.similar([2**70]), "must all be integers or all text"),
        (lambda rec: rec.recommend({"item_id": [1, 2], "user_id": ["u", None]}), "column user_id has 1 nulls"),
        (lambda rec: rec.recommend(_clicks([5.0, float("nan")])), "column timestamp has 1 nulls"),
        (lambda rec: rec.recommend(_clicks(["9", "10"])), "column timestamp is string, but must be numbers"),
        (lambda rec: rec.recommend({"items": [[1], None]}), "column items has 1 nulls"),
        (lambda rec: rec.recommend(small_run().dataset.path / "test"), "items are indices"),
        (lambda rec: rec.recommend(["abc"]), "not a list of item ids"),
        (lambda rec: rec.recommend([[1], ""]), "holds '', which is not a list of item ids"),
        (lambda rec: rec.recommend([{"a", "b"}]), "sessions holds a set, which has no order"),
        (
            lambda rec: rec.recommend(Path(__file__).parents[1] / "README.md"),
            "README.md is not a complete Parquet file",
        ),
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
        (lambda rec: rec.save("/proc/no/such"), "cannot create /proc/no/such"),
        (lambda rec: Recommender.load("no/such/run"), "does not exist"),
        (lambda rec: Recommender.load(small_run().run, dtype="fp16"), "dtype is 'fp16'; give one of auto"),
        (lambda rec: Recommender.load(__file__), r"test_python_api.py is a file; give a run folder"),
        (lambda rec: Recommender.load(ROOT / "tests"), "tests has no exported model; give a run folder"),
        (lambda rec: rec.recommend("no_such.parquet"), "sessions: no_such.parquet does not exist; give a Parquet file"),
        (lambda rec: rec.recommend([], category=["a", "b"]), r"category is \['a', 'b'\]; give the name"),
        (lambda rec: rec.recommend([], exclude_seen="no"), "exclude_seen is 'no'; give True, False or None"),
        (lambda rec: rec.recommend([], without=7), r"without is 7; give a list of item ids: \[7\]"),
        (lambda rec: rec.recommend([], among=pd.DataFrame({"item_id": [1]})), "among is DataFrame; give a list"),
        (lambda rec: rec.explain([[1, 2]]), "session holds lists; give one list of item ids"),
        (lambda rec: rec.explain("abc"), r"session is 'abc'; give a list of item ids: \['abc'\]"),
        (lambda rec: rec.explain([1], exclude_seen="no"), "exclude_seen is 'no'"),
    ],
)
def test_a_mistake_is_one_line(rec: Recommender, call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        call(rec)
    assert "\n" not in str(raised.value)


def test_an_error_of_a_command_names_the_argument_of_fit_that_fixes_it() -> None:
    plain = "train failed: setting sbr.lr: bad; see --help"
    assert str(python_api._naming_argument(plain, "settings")) == plain
    named = python_api._naming_argument("no train rows; use another --split; see --help", "preparation")
    assert str(named).endswith("(in fit: preparation={'split': ...})")


def test_several_threads_and_models_at_once(rec: Recommender, sessions: list[list[Any]], tmp_path: Path) -> None:
    rec.save(tmp_path / "saved")
    second = Recommender.load(tmp_path / "saved")
    expected = [rec.recommend([session], k=5) for session in sessions]
    options: dict[str, Any] = {"k": 5, "exclude_seen": True, "without": rec.item_ids.to_pylist()[:9]}
    restricted = [rec.recommend([session], **options) for session in sessions]
    alike = rec.similar(rec.item_ids.to_pylist()[:5])

    def ask(number: int) -> bool:
        model = (rec, second)[number % 2]
        return (
            [model.recommend([session], k=5) for session in sessions] == expected
            and [model.recommend([session], **options) for session in sessions] == restricted
            and model.similar(model.item_ids[:5]) == alike
        )

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8), timeout=120)) == [True] * 8


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
    # A few epochs are enough for a log in which each item has one successor.
    fit = functools.partial(Recommender.fit, settings={"sbr.epochs": 3, "tables.dim": 16, "runtime.device": "cpu"})
    monkeypatch.setattr(Recommender, "fit", fit)
    monkeypatch.chdir(tmp_path)
    names = run_programs(ROOT / "docs" / "python.md")
    run_programs(ROOT / "docs" / "explaining.md")
    # README does the same, and is spared another training.
    monkeypatch.setattr(Recommender, "fit", lambda *tables: Recommender.load("model"))
    monkeypatch.setattr(Recommender, "save", lambda self, path: None)
    run_programs(ROOT / "README.md")
    # It once ended with a stack trace where pandas, which is no dependency, was not installed.
    assert "to_pandas" not in (ROOT / "README.md").read_text()
    (row,) = names["ranked"].to_pylist()
    assert row["item_ids"][0] == "paper"
    assert row["titles"][0] == "a paper"
    assert "clay" not in row["item_ids"]


def test_fits_lists_without_items_in_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []

    def run(command: str, options: dict[str, Any], on_line: object) -> None:
        commands.append(command)
        if command == "prepare":
            assert set(options) == {"sessions", "output"}
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


def test_changes_nothing_of_the_process() -> None:
    """In a new process, because importing is part of it. A fit fails here after `prepare` was run."""
    code = f"""
import logging, os, signal, sys, warnings
import torch
def state():
    levels = {{name: (one.level, one.handlers) for name, one in logging.root.manager.loggerDict.items()
              if isinstance(one, logging.Logger) and (one.handlers or name.startswith("llmgr_rec"))}}
    return (dict(os.environ), torch.get_num_threads(), torch.get_num_interop_threads(), torch.initial_seed(),
            torch.is_grad_enabled(), torch.get_default_dtype(), torch.distributed.is_initialized(),
            logging.root.handlers[:], logging.root.level, logging.root.manager.disable,
            logging.getLogger("llmgr_rec").handlers, logging.getLogger("llmgr_rec").level,
            [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)], sys.excepthook, sys.unraisablehook,
            os.getcwd(), os.umask(0o022), sys.path[:])
before, filters = state(), warnings.filters[:]
from llmgr_rec import Recommender, UserError
rec = Recommender.load({str(small_run().run / "export" / "sbr")!r})
rec.recommend([rec.item_ids.to_pylist()[:2]])
rec.similar(rec.item_ids[:1])
try:
    Recommender.fit([[1, 2]])
except UserError as error:
    assert str(error).startswith("prepare failed: "), error
after = state()
assert after == before, [pair for pair in zip(before, after) if pair[0] != pair[1]]
own = [one for one in warnings.filters if one not in filters]
print(*({{"peft", "transformers", "duckdb", "matplotlib", "polars"}} & set(sys.modules)))
print([one for one in own if one[1] is None and one[2] is Warning])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "\n[]\n"), done.stderr
    assert done.stderr == ""


def signatures() -> dict[str, str]:
    """Public methods and properties of `Recommender` with their annotations."""
    members = {name: found for name, found in vars(Recommender).items() if not name.startswith("_")}
    functions = {
        name: getattr(found, "fget", None) or getattr(found, "__func__", found) for name, found in members.items()
    }
    return {name: str(inspect.signature(function)) for name, function in functions.items()}


def test_the_signatures_are_those_that_were_promised() -> None:
    """Whoever changes these changes what other people's code may rely on."""
    table = "session_id, item_ids, titles, scores, fallback"
    assert signatures() == SIGNATURES
    rec = Recommender.load(small_run().run / "export" / "sbr")
    found = rec.recommend([[]], k=1)
    assert ", ".join(found.column_names) == table
    assert found.schema.field("scores").type == pa.large_list(pa.float32())


def write_program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_extends_to_another_catalog_without_changing_itself(rec: Recommender) -> None:
    before = rec.recommend([["i1"]], k=3)
    extended = rec.extend([{"item_id": "new", "title": "thing i1"}, {"item_id": "i1"}, {"item_id": "i2"}])
    (row,) = extended.recommend([["new", "i7"]], k=9).to_pylist()
    assert sorted(row["item_ids"]) == ["i1", "i2", "new"]
    assert extended.titles.to_pylist() == ["thing i1", "<b>Thing</b> & i1", "<b>Thing</b> & i2"]
    assert rec.recommend([["i1"]], k=3).equals(before)
    folder = Path(str(extended).rpartition(" from ")[2].removesuffix(">"))
    assert folder.is_dir()
    del extended
    assert not folder.exists()
    with pytest.raises(UserError, match=r"items: item_id 'i1' occurs more than once"):
        rec.extend({"item_id": ["i1", "i1"]})


def test_an_interrupted_fit_leaves_no_process_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def interrupt(line: str) -> None:
        seen.append(line)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "executable", str(write_program(tmp_path / "python", "echo $$; exec sleep 60")))
    monkeypatch.setattr(python_api, "_write_line", interrupt)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.raises(KeyboardInterrupt):
        Recommender.fit(pd.DataFrame({"session_id": ["a", "a"], "item_id": [5, 7]}), verbose=True)
    assert not Path(f"/proc/{int(seen[0])}").exists()
    assert not list((tmp_path / "temporary").iterdir())


FIT = """
import sys
import pandas as pd
from llmgr_rec import Recommender
users = [user for user in range(60) for _ in range(6)]
log = pd.DataFrame({"user_id": users, "item_id": [(user + click) % 9 for click, user in enumerate(users)]})
Recommender.fit(log, settings={"sbr.epochs": 500, "tables.dim": 16, "runtime.device": "cpu"}, verbose=True)
"""


@pytest.mark.slow
def test_fits_a_log_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sessions = [[(start + click) % 9 for click in range(6)] for start in range(60)]
    settings = {"sbr.epochs": 5, "tables.dim": 16, "runtime.device": "cpu"}
    fitted = Recommender.fit(pl.Series(sessions), settings=settings, output=tmp_path / "shop", verbose=True)
    assert "sbr epoch 5: validation" in capsys.readouterr().err
    assert Recommender.load(tmp_path / "shop").evaluate()["test"]["sbr"]["hr@5"] > 0.9
    first, *others = fitted.recommend([[3, 4, 5], [77], []], k=2).to_pylist()
    assert first["item_ids"][0] == 6
    assert first["titles"] == [None, None]
    assert [row["fallback"] for row in others] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_training_fit_that_ends_leaves_no_process(tmp_path: Path, number: int) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", FIT], stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        assert process.stderr is not None
        lines = [next(line for line in process.stderr if "epoch 1:" in line)]
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(number)
        lines += process.stderr.readlines()
        assert process.wait(30)
    assert children
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "training runs on"
        time.sleep(0.05)
    if number == signal.SIGINT:
        assert lines[-1] == "KeyboardInterrupt\n"
        assert not list(tmp_path.glob("llmgr_rec-*"))
