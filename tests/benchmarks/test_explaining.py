import json
from pathlib import Path

import pytest

from benchmarks.explaining import LENGTHS, main
from llmgr_rec.errors import UserError
from tests.small_run import small_run


def test_each_length_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(small_run().run / "export" / "sbr")
    main(["--run", run, "--rounds", "1", "--k", "2", "--threads", "1", "--output", str(tmp_path / "out.json")])
    assert capsys.readouterr().out.count("50 clicks") == 2
    content = json.loads((tmp_path / "out.json").read_text())
    assert set(content["results"]["CPU"]) == {str(length) for length in LENGTHS}
    with pytest.raises(UserError, match="--rounds is 0"):
        main(["--run", run, "--rounds", "0"])
