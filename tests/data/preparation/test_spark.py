"""prepare with Spark gives the files that it gives with DuckDB, byte by byte, for every option."""

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmgr_rec.data.preparation.pipeline import prepare_dataset
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.errors import UserError
from llmgr_rec.prepare import main
from tests.data.prepare_inputs import write_interactions
from tests.examples.run_example import ROOT
from tests.marked_process import MarkedProcess
from tests.optional_programs import needs_spark
from tests.scoring.sessions import all_bytes

# A test takes a small part of this on an idle machine.
TIMEOUT_S = 600
SECOND = 1_700_000_000
ARGUMENTS = {"min_interactions": 2, "threads": 1}


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One session for all tests, set up for small data."""
    builder = importlib.import_module("pyspark.sql").SparkSession.builder.master("local[2]")
    options = {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.sql.shuffle.partitions": "3",
        "spark.sql.codegen.wholeStage": "false",
        "spark.sql.warehouse.dir": str(tmp_path_factory.mktemp("warehouse")),
        # Settings that change results, which prepare must not take over.
        "spark.sql.session.timeZone": "Asia/Tokyo",
        "spark.sql.ansi.enabled": "false",
    }
    for name, value in options.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()


def random_log(seed: int, clicks: int = 300) -> dict[str, np.ndarray]:
    """Users who return after breaks, with equal rows, equal times and consecutive repeats."""
    draw = np.random.default_rng(seed)
    users, items = draw.integers(0, 25, clicks), draw.zipf(1.4, clicks) % 20
    days = draw.integers(0, 12, clicks)
    times = SECOND + 86400 * days + 60 * draw.integers(0, 40, clicks)
    repeated = draw.integers(0, clicks, clicks // 10)
    rows = np.concatenate([np.arange(clicks), repeated])
    return {"user": users[rows], "item": items[rows], "time": times[rows]}


def words(numbers: np.ndarray, prefix: str) -> pa.Array:
    return pa.array([f"{prefix}{number}" for number in numbers])


def write_catalog(folder: Path, item_ids: Any) -> Path:
    count = len(item_ids)
    titles = [f"Ünïcode thing {n % 5} of <b>{n}</b>" if n % 7 else None for n in range(count)]
    table = {"item_id": item_ids, "title": titles, "brand": [f"Brand {n % 3}" for n in range(count)]}
    pq.write_table(pa.table(table), folder / "items.parquet")
    return folder / "items.parquet"


def files_of_several_types(folder: Path) -> dict[str, Any]:
    """A folder of files with text, integers and floats as ids, and dates of the folders as times."""
    log = random_log(0)
    for number, kind in enumerate((pa.string(), pa.int32(), pa.float64())):
        # All that patterns and addresses take for something else.
        place = folder / "lög [1] {a} %20" / f"timestamp=2026-11-0{number + 1}"
        place.mkdir(parents=True)
        rows = slice(110 * number, 110 * (number + 1))
        ids = {"user_id": pa.array(log["user"][rows]), "item_id": pa.array(log["item"][rows]).cast(kind)}
        pq.write_table(pa.table(ids), place / f"part {number}.parquet", row_group_size=40)
    items = write_catalog(folder, pa.array([str(n) for n in range(20)]))
    return {"interactions": str(folder / "lög [1] {a} %20"), "items": str(items), "duplicates": "keep"}


def sessions_of_a_log_in_nanoseconds(folder: Path) -> dict[str, Any]:
    log = random_log(1, 500)
    nanoseconds = pa.array(log["time"] * 10**9 + np.arange(len(log["time"])) % 3, pa.timestamp("ns", "Asia/Tokyo"))
    columns = {"user_id": words(log["user"], "user"), "item_id": pa.array(log["item"]), "timestamp": nanoseconds}
    pq.write_table(pa.table(columns), folder / "log.parquet")
    return {
        "interactions": str(folder / "log.parquet"),
        "items": str(write_catalog(folder, pa.array(np.arange(30)))),
        "split": "temporal",
        "session_gap": "2h",
        "consecutive_repeats": "merge",
        "hold_out_items": 0.2,
        "keep_unseen_items": True,
        "min_interactions": 1,
        "max_length": 3,
    }


def sessions_with_a_split_column(folder: Path) -> dict[str, Any]:
    log = random_log(2, 200)
    lists = [log["item"][10 * row : 10 * row + 1 + row % 9].tolist() for row in range(20)]
    table = {
        "session_id": [f"s{row * 7 % 20}" for row in range(20)],
        "items": pa.array(lists, pa.large_list(pa.int64())),
        "phase": ["Train"] * 12 + ["dev"] * 4 + ["test"] * 4,
        "timestamp": pa.array(log["time"][:20].astype("datetime64[s]").astype("datetime64[us]")),
    }
    pq.write_table(pa.table(table), folder / "sessions.parquet", row_group_size=6)
    return {
        "sessions": str(folder / "sessions.parquet"),
        "items": str(write_catalog(folder, pa.array(np.arange(10)))),
        "missing_items": "keep",
        "split": "predefined",
        "split_column": "phase",
        "prefix_augmentation": "all",
        "max_length": 3,
        "long_sessions": "newest",
        "min_session_length": 1,
    }


def users_with_a_prefix_and_newest_for_validation(folder: Path) -> dict[str, Any]:
    log = random_log(3)
    names = [f"{'test' if user % 4 == 0 else 'train'}_{user}" for user in log["user"]]
    columns = {"who": names, "item_id": words(log["item"], "i"), "At": log["time"] + 0.25}
    pq.write_table(pa.table(columns), folder / "log.parquet")
    return {
        "interactions": str(folder / "log.parquet"),
        "rename": "who=user_id,At=timestamp",
        "split": "predefined",
        "valid_share": 0.3,
    }


def an_item_twice(folder: Path) -> dict[str, Any]:
    log = write_interactions(folder / "log.parquet", [("u", f"i{n}", n) for n in range(5)])
    return {"interactions": str(log), "items": str(write_catalog(folder, pa.array(["i0", "i1", "i0"])))}


@needs_spark
@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize(
    "make",
    [
        files_of_several_types,
        sessions_of_a_log_in_nanoseconds,
        sessions_with_a_split_column,
        users_with_a_prefix_and_newest_for_validation,
    ],
    ids=lambda make: make.__name__,
)
def test_spark_writes_the_files_of_duckdb(tmp_path: Path, spark: Any, make: Any) -> None:
    given = {**ARGUMENTS, **make(tmp_path)}
    prepare_dataset(PrepareSettings(output=str(tmp_path / "duckdb"), **given))
    prepare_dataset(PrepareSettings(output=str(tmp_path / "spark"), **given), spark=spark)
    found, expected = all_bytes(tmp_path / "spark"), all_bytes(tmp_path / "duckdb")
    assert list(found) == list(expected)
    assert [name for name in found if found[name] != expected[name]] == []
    assert spark.conf.get("spark.sql.session.timeZone") == "Asia/Tokyo"
    assert spark.catalog.listTables() == []


@needs_spark
@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_a_mistake_in_the_input_has_the_line_of_duckdb(tmp_path: Path, spark: Any) -> None:
    settings = PrepareSettings(output=str(tmp_path / "out"), **{**ARGUMENTS, **an_item_twice(tmp_path)})
    lines = []
    for session in (None, spark):
        with pytest.raises(UserError) as raised:
            prepare_dataset(settings, spark=session)
        lines.append(str(raised.value))
    assert lines[0] == lines[1]
    assert "is a duplicate of" in lines[0]
    assert not (tmp_path / "out").exists()


@needs_spark
@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.dist
def test_the_command_starts_spark_and_ends_it(tmp_path: Path) -> None:
    log = write_interactions(tmp_path / "log.parquet", [(f"u{n % 4}", f"i{n % 5}", n) for n in range(40)])
    common = ["--interactions", str(log), "--min_interactions", "1", "--output"]
    main([*common, str(tmp_path / "duckdb")])
    words = [
        "-m",
        "llmgr_rec.prepare",
        *common,
        str(tmp_path / "spark"),
        "--engine",
        "spark",
        "--spark_master",
        "local[1]",
    ]
    environment = {"PYTHONPATH": str(ROOT), "SPARK_LOCAL_IP": "127.0.0.1"}
    process = MarkedProcess(words, tmp_path / "log", tmp_path, environment)
    try:
        assert process.wait(TIMEOUT_S - 60) == 0, process.log.read_text()
        assert not process.left_after(30)
    finally:
        process.kill()
    assert all_bytes(tmp_path / "spark") == all_bytes(tmp_path / "duckdb")
    assert "Spark of local[1]" in process.log.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["duckdb", "log", "log.parquet", "spark"]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("pyspark", r"needs the package pyspark, which is not installed: pip install 'pyspark"),
        ("java", "needs Java 17 or later, and there is no java in JAVA_HOME=.*: apt install openjdk"),
    ],
)
def test_what_spark_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, message: str) -> None:
    def find_spec(name: str) -> object:
        return None if name == missing else object()

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    log = write_interactions(tmp_path / "log.parquet", [("u", "i", 1)])
    with pytest.raises(UserError, match=message):
        main(["--interactions", str(log), "--output", str(tmp_path / "out"), "--engine", "spark"])


def test_a_master_needs_the_engine(tmp_path: Path) -> None:
    log = write_interactions(tmp_path / "log.parquet", [("u", "i", 1)])
    with pytest.raises(UserError, match="--spark_master needs --engine spark"):
        main(["--interactions", str(log), "--output", str(tmp_path / "out"), "--spark_master", "local"])
