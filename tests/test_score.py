"""The score entry point, killed and taken up again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmgr_rec.cli import run_cli
from llmgr_rec.errors import UserError
from llmgr_rec.score import main
from tests.scoring.sessions import all_bytes, raw_sessions, read_scores, write_sessions
from tests.small_run import small_run


def words(source: Path, output: Path, *more: str) -> list[str]:
    return ["--run", str(small_run().run), "--input", str(source), "--output", str(output), *more]


def test_scores_and_says_what_it_did(tmp_path, capsys):
    source = tmp_path / "in"
    write_sessions(source / "day=7" / "in.PARQUET", raw_sessions(12), country=["se"] * 12)
    columns = ("--columns", "session_id,country,day")
    main(words(source, tmp_path / "out", "--k", "3", *columns, "--repeats", "exclude"))
    rows = read_scores(tmp_path / "out")
    assert list(rows[0]) == ["session_id", "item_ids", "scores", "fallback", "country", "day"]
    assert rows[0]["day"] == 7
    assert all(len(row["item_ids"]) == 3 for row in rows)
    assert re.search(
        r"^score: 12 sessions, 3 clicks .*; wrote \S+ \(Parquet files: 1\)$", capsys.readouterr().out, re.M
    )
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["model"]["stage"] == "behave"
    assert manifest["settings"]["repeats"] == "exclude"
    with pytest.raises(UserError, match="repeats"):
        main(words(source, tmp_path / "other", "--repeats", "true"))


@pytest.mark.slow
def test_killed_half_way_and_run_again_gives_the_same_bytes(tmp_path):
    source = write_sessions(tmp_path / "in.parquet", raw_sessions(400), row_group_size=50)
    # Many small parts, so that the kill comes before the last one on a busy machine, too.
    more = ("--part_rows", "5", "--batch_size", "8")
    main(words(source, tmp_path / "whole", *more))
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "llmgr_rec.score", *words(source, killed, *more)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(killed.glob("part-*"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(list(killed.glob("part-*")))
    assert 3 <= finished < 80
    assert not (killed / "_SUCCESS").exists()
    main(words(source, killed, *more))
    assert all_bytes(killed) == all_bytes(tmp_path / "whole")


def test_the_command_exits_2_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["score", *words(tmp_path / "absent", tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'absent'} does not exist; give a Parquet file or a folder of them to --input\n"
    )
