import json

import pytest

from benchmarks import second_run
from tests.small_run import write_log


def test_the_table_has_a_column_for_each_run():
    text = second_run.table({"first": {"llmgr_rec.prepare": 1.25}, "second": {"llmgr_rec.prepare": 0.5}})
    assert text.splitlines()[1].split() == ["llmgr_rec.prepare", "1.25", "0.50"]


@pytest.mark.slow
def test_the_second_run_costs_less(tmp_path, capsys):
    write_log(tmp_path / "raw")
    report = tmp_path / "report.json"
    words = ["--data", str(tmp_path / "raw"), "--llm", "random-tiny", "--threads", "1", "--output", str(report)]
    second_run.main(words)
    results = json.loads(report.read_text())["results"]
    assert set(results["first"]) == {"llmgr_rec.prepare", "llmgr_rec.train"}
    assert results["second"]["llmgr_rec.prepare"] < results["first"]["llmgr_rec.prepare"]
    assert "processor seconds" in capsys.readouterr().out
