import json

import duckdb
import pytest

from benchmarks import preparation
from llmgr_rec.errors import UserError


def test_it_measures_prepare_on_a_generated_log(tmp_path, capsys):
    report = tmp_path / "report.json"
    preparation.main(["--clicks", "2000", "--threads", "1", "--folder", str(tmp_path), "--output", str(report)])
    results = json.loads(report.read_text())["results"]
    assert 50 < results["process_mib"] < 2000
    assert "2,000 clicks" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_log_is_skewed(tmp_path):
    preparation.write_log(tmp_path / "log.parquet", 50_000)
    query = "SELECT count(*) FROM {} GROUP BY item_id ORDER BY 1 DESC LIMIT 1"
    ((most,),) = duckdb.sql(query.format(f"'{tmp_path}/log.parquet'")).fetchall()
    assert 0.05 < most / 50_000 < 0.15


def test_too_few_clicks_are_refused():
    with pytest.raises(UserError, match="--clicks must be 1000 or more"):
        preparation.main(["--clicks", "10"])
