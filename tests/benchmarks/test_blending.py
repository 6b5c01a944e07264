import json
from pathlib import Path

import pytest

from benchmarks.blending import main
from llmgr_rec.config_file import save_config
from tests.explanation.explained import export
from tests.small_run import config, small_run


def test_every_way_to_blend_has_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightgbm", reason="the extra rerank is not installed")
    run, data = tmp_path / "run", small_run().dataset
    weights = {"item_knn": 1e-3, "text_knn": 1e-3}
    export(run / "export" / "sbr", config(), weights, "sbr", data.manifest)
    save_config(config(), run / "config.yaml")
    main(["--run", str(run), "--dataset", str(data.path), "--output", str(tmp_path / "o.json"), "--threads", "1"])
    results = json.loads((tmp_path / "o.json").read_text())["results"]["ways"]
    assert set(results) == {"selected weights", "learned weights", "learned weights by session", "trees"}
    assert results["selected weights"]["gain"]["mean"] == 0
    # The selected weights are far too small.
    assert results["trees"]["gain"]["low"] > 0
    assert "trees: NDCG@20" in capsys.readouterr().out
