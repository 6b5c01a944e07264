"""Scores can be read by the programs that data engineers use, and have the titles that Recommender gives."""

import importlib.util
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest

from llmgr_rec import Recommender, UserError
from llmgr_rec.score import main as score
from tests.scoring.sessions import raw_sessions, read_scores, write_sessions
from tests.small_run import small_run

SESSIONS = raw_sessions(9)


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of several parts, with titles."""
    folder = tmp_path_factory.mktemp("scores")
    write_sessions(folder / "in.parquet", SESSIONS)
    score([*arguments(folder), "--titles", "--part_rows", "4"])
    return folder / "out"


def arguments(folder: Path) -> list[str]:
    return [
        *("--run", str(small_run().run), "--stage", "sbr", "--k", "3"),
        *("--input", str(folder / "in.parquet"), "--output", str(folder / "out")),
    ]


def rows_of(scores: Path) -> list[dict[str, Any]]:
    rows = read_scores(scores)
    assert [row["session_id"] for row in rows] == [f"in-{number}" for number in range(len(SESSIONS))]
    return rows


def test_titles_are_those_of_the_recommender(scores: Path) -> None:
    recommender = Recommender.load(small_run().run / "export" / "sbr")
    assert [row["titles"] for row in rows_of(scores)] == recommender.recommend(SESSIONS, k=3)["titles"].to_pylist()


def test_what_repeats_is_written_once(scores: Path) -> None:
    group = pq.read_metadata(next(scores.glob("*.parquet"))).row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    has_dictionary = {column.path_in_schema: column.has_dictionary_page for column in columns}
    assert has_dictionary == {
        "session_id": False,
        "item_ids.list.element": True,
        "titles.list.element": True,
        "scores.list.element": False,
        "fallback": False,
    }


def test_titles_belong_to_the_job(scores: Path) -> None:
    score([*arguments(scores.parent), "--titles", "--part_rows", "4"])
    with pytest.raises(UserError, match=r"another job, which differs in settings \(titles was True, is None\)"):
        score([*arguments(scores.parent), "--part_rows", "4"])


def test_duckdb_pandas_and_polars_read_scores(scores: Path) -> None:
    expected = rows_of(scores)
    assert duckdb.sql(f"FROM '{scores}/*.parquet' ORDER BY session_id").to_arrow_table().to_pylist() == expected
    unnested = duckdb.sql(f"SELECT unnest(item_ids) AS item_id, unnest(titles) AS title FROM '{scores}/*.parquet'")
    assert len(unnested.fetchall()) == sum(len(row["item_ids"]) for row in expected)
    table = pd.read_parquet(scores)
    assert [list(row) for row in table["titles"]] == [row["titles"] for row in expected]
    long = table.explode(["item_ids", "titles", "scores"])
    assert list(long["titles"]) == [title for row in expected for title in row["titles"]]
    assert pl.read_parquet(scores / "*.parquet").to_dicts() == expected
    assert pl.scan_parquet(scores / "*.parquet").sort("session_id").collect().to_dicts() == expected


@pytest.mark.skipif(importlib.util.find_spec("pyspark") is None, reason="pyspark is not installed")
def test_spark_reads_scores(scores: Path) -> None:
    session = importlib.import_module("pyspark.sql").SparkSession.builder.master("local[1]").getOrCreate()
    try:
        rows = session.read.parquet(str(scores)).sort("session_id").collect()
        assert [row.asDict() for row in rows] == rows_of(scores)
    finally:
        session.stop()
