import json
from pathlib import Path

import pytest

from benchmarks.growing_catalog import main
from llmgr_rec.errors import UserError
from tests.small_run import write_log


def test_one_day_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--days is 1; give 2 or more"):
        main(["--interactions", "a", "--items", "b", "--days", "1", "--output", str(tmp_path / "o.json")])


@pytest.mark.slow
@pytest.mark.dist
def test_every_day_has_its_figures(tmp_path: Path) -> None:
    interactions, items = write_log(tmp_path)
    words = ["--interactions", str(interactions), "--items", str(items), "--output", str(tmp_path / "o.json")]
    main([*words, "--days", "2", "--epochs", "1", "--warm_epochs", "1", "--dim", "16", "--threads", "1"])
    row, together = json.loads((tmp_path / "o.json").read_text())["results"]["rows"]
    assert row["day"] == 2
    assert row["sessions"] > 5
    assert all(row[f"seconds {name}"] > 0 for name in ("anew", "short", "warm", "extended"))
    assert len(row["ndcg@20 warm"]) == 3
    assert together["day"] == "all"
    assert together["gain of warm over anew"] == row["gain of warm over anew"]
