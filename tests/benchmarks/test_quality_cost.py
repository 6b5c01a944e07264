"""The quality/cost benchmark: its measures against plain ones, and one small run of it."""

import json
import math

import numpy as np
import pyarrow as pa
import torch

from benchmarks.quality_cost import ROUTED, main, ndcg, paired_interval
from llmgr_rec.storage.number_format import resolve_dtype
from tests.small_run import small_run


def test_ndcg_counts_the_place_of_the_target():
    catalog = small_run().catalog
    ids = catalog.item_ids.to_pylist()
    output = pa.table({"target": [2, 0, 5], "item_ids": [[ids[2], ids[1]], [ids[1], ids[0]], [ids[1], ids[2]]]})
    np.testing.assert_allclose(ndcg(output, catalog), [1, 1 / math.log2(3), 0])


def test_an_interval_holds_the_mean_and_shrinks_with_the_sessions():
    rng = np.random.default_rng(0)
    few, many = rng.normal(1, 1, 100), rng.normal(1, 1, 10_000)
    for values in (few, many):
        low, high = paired_interval(values)
        assert low < values.mean() < high
    assert np.subtract(*paired_interval(few)) < 5 * np.subtract(*paired_interval(many))


def test_every_way_is_measured(tmp_path, capsys):
    words = [
        "--run",
        str(small_run().run),
        "--dataset",
        str(small_run().dataset.path),
        "--output",
        str(tmp_path / "qc.json"),
    ]
    main([*words, "--rounds", "1", "--threads", "1", "--sessions", "30"])
    results = json.loads((tmp_path / "qc.json").read_text())["results"]
    names = list(results["modes"])
    formats = ["float32"] if resolve_dtype("auto") == torch.float32 else ["float32", "bfloat16"]
    assert [name for name in names if name in ("float32", "bfloat16")] == formats == names[: len(formats)]
    assert {"LLM for 25%, else GNN", "LLM for 0%, else GNN"} <= set(names)
    assert results["modes"]["float32"]["ndcg@20 lost"] == {"mean": 0, "low": 0, "high": 0}
    assert all(mode["sessions_per_s"]["median"] > 0 for mode in results["modes"].values())
    values = results["thresholds"][ROUTED]
    assert values["0.1"] >= values["0.25"] >= values["0.5"]
    assert (tmp_path / "qc.svg").read_text().startswith("<?xml")
    assert "30 validation sessions" in capsys.readouterr().out
