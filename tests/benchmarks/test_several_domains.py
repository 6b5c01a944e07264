import json
from pathlib import Path

import pytest

from benchmarks.several_domains import main
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.errors import UserError
from tests.small_run import write_log


def test_a_single_domain_is_refused(tmp_path: Path) -> None:
    words = ["--interactions", "a=F", "--items", "a=G", "--work", str(tmp_path), "--output", str(tmp_path / "o.json")]
    with pytest.raises(UserError, match="name two or more domains"):
        main(words)


@pytest.mark.slow
@pytest.mark.dist
def test_each_domain_has_its_figures_and_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = {name: write_log(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))}
    clicks, items = (",".join(f"{name}={paths[place]}" for name, paths in logs.items()) for place in (0, 1))
    words = ["--interactions", clicks, "--items", items, "--work", str(tmp_path / "work"), "--threads", "1"]
    words += ["--settings", "--sbr.epochs 1 --tables.dim 16", "--output", str(tmp_path / "o.json")]
    main(words)
    rows = json.loads((tmp_path / "o.json").read_text())["results"]["rows"]
    assert [(row["domain"], row["sessions"]) for row in rows] == [("a", 90), ("b", 90)]
    for row in rows:
        for model in (
            "alone",
            "together",
            "transferred",
            "random",
            "random without neighbors",
            "popularity",
            "text_knn",
        ):
            mean, low, high = row[model]
            assert 0 <= low <= mean <= high <= 1
    # It knows the items of the other domain, and so its words.
    assert Catalog.load(tmp_path / "work/without-a-0-extended/export/sbr").train_count_V.any()
    monkeypatch.setattr("benchmarks.several_domains.train", pytest.fail)
    main(words)
    assert json.loads((tmp_path / "o.json").read_text())["results"]["rows"] == rows
