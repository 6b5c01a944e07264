import json
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.repeats_threshold import main, with_repeats
from llmgr_rec.errors import UserError
from tests.small_run import write_log


def test_the_share_of_repeats_grows_and_every_rule_has_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interactions, items = write_log(tmp_path)
    words = ["--interactions", str(interactions), "--items", str(items), "--output", str(tmp_path / "o.json")]
    main([*words, "--shares", "0,0.9"])
    rows = json.loads((tmp_path / "o.json").read_text())["results"]["rows"]
    assert rows[0]["repeated_targets"] < 0.5 < rows[1]["repeated_targets"]
    assert rows[1]["item_knn, exclude"]["hr@20"] < rows[1]["item_knn, allow"]["hr@20"]
    assert capsys.readouterr().out.count("**") >= 8
    with pytest.raises(UserError, match="--shares"):
        main([*words, "--shares", "some"])


def test_clicks_repeat_clicks_of_the_same_user_before_them() -> None:
    users, items = [*"aaabbbbb"], [*"xyzstuvw"]
    log = pa.table({"user_id": users, "item_id": items, "timestamp": list(range(8))})
    found = with_repeats(log, 1.0)["item_id"].to_pylist()
    assert found == [*"xxxsssss"]
    assert with_repeats(log, 0.0)["item_id"].to_pylist() == items
