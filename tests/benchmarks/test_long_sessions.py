"""The comparison of training rows of long sessions, with a baseline that takes no time."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.long_sessions import main
from llmgr_rec.errors import UserError
from tests.data.prepare_inputs import Click, prepare


def test_two_data_sets_are_compared_on_the_same_sessions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clicks: list[Click] = [(f"u{u}", f"i{(u + n) % 9}", n) for u in range(12) for n in range(11)]
    folders = {}
    changes: dict[str, dict[str, Any]] = {
        "newest": {"long_sessions": "newest"},
        "split": {"long_sessions": "split"},
        "shorter": {"max_length": 2},
    }
    for name, options in changes.items():
        folders[name] = tmp_path / name
        prepare(tmp_path, clicks[:-1], output=str(folders[name]), **{"max_length": 3, **options})
    (tmp_path / "few.yaml").write_text("variants:\n  Item-kNN: {model: item_knn}\n")
    words = ["--newest", str(folders["newest"]), "--output", str(tmp_path / "o")]
    words += ["--experiment", str(tmp_path / "few.yaml")]
    main([*words, "--split", str(folders["split"])])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("12 validation sessions, 2 seeds.")
    assert "| training rows | 12 | 36 | |" in lines
    assert "| training targets | 36 | 95 | |" in lines
    assert lines[-1].startswith("| Item-kNN | 0.")
    with pytest.raises(UserError, match="have different items or validation sessions; prepare both from the same"):
        main([*words, "--split", str(folders["shorter"])])
