import json

import pytest

from benchmarks import large_catalogs
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.errors import UserError
from llmgr_rec.storage.bundle import load_bundle


def test_the_run_belongs_to_the_data_set(tmp_path):
    dataset, run = large_catalogs.make_run(tmp_path, items=50, sessions=7)
    assert Dataset(dataset).manifest.num_sessions == {"train": 7, "valid": 7, "test": 7}
    assert load_bundle(run / "export" / "sbr").catalog.hash == Catalog.of(Dataset(dataset)).hash


def test_too_few_items_are_refused():
    with pytest.raises(UserError, match="--items"):
        large_catalogs.main(["--items", "[3]"])


@pytest.mark.slow
def test_both_commands_are_measured(tmp_path, capsys):
    report = tmp_path / "report.json"
    large_catalogs.main(["--items", "[100]", "--sessions", "20", "--threads", "1", "--output", str(report)])
    costs = json.loads(report.read_text())["results"]["100"]
    assert set(costs) == {"score", "evaluate"}
    assert all(cost["processor_s"] > 0 for cost in costs.values())
    assert "evaluate" in capsys.readouterr().out
