"""`torchx run -s local_cwd dist.ddp llmgr_rec.train` really trains, on two gloo ranks."""

import json
from pathlib import Path

import pytest

from datagen.synthetic import generate
from llmgr_rec.prepare import main as prepare
from tests.torchx.launcher import torchx
from torchx_components.configure import main as configure

SMALL = (
    "--llm.name_or_path random-tiny --sbr.max_steps 3 --align.max_steps 2 --behave.max_steps 2 --runtime.log_every 1"
)


@pytest.mark.dist
def test_the_documented_line_trains_all_stages(tmp_path: Path) -> None:
    generate(tmp_path / "raw", sessions=120, items=48)
    files = [str(tmp_path / "raw" / f"{name}.parquet") for name in ("interactions", "items")]
    prepare(["--interactions", files[0], "--items", files[1], "--output", str(tmp_path / "dataset")])
    # The line reads the defaults of the folder it is typed in, which is not the repository's.
    configure(["--output", str(tmp_path / ".torchxconfig")])
    line = f"run -s local_cwd dist.ddp -- --config quickstart --dataset dataset --output run {SMALL}"
    done = torchx(line.split(), cwd=tmp_path, timeout_s=240)
    assert done.returncode == 0, done.stderr
    assert "trained sbr, align, behave" in done.stderr
    assert "stage align starts, 2 of 3" in done.stderr
    assert (tmp_path / "run" / "export" / "behave" / "bundle.json").is_file()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {record["stage"] for record in records} == {"sbr", "align", "behave"}
    # Every rank exports its own columns of the item table.
    assert len(list((tmp_path / "run" / "export" / "sbr" / "tables").glob("item_id-*.safetensors"))) == 2


@pytest.mark.slow
@pytest.mark.dist
def test_a_user_error_is_reported_and_fails_the_job(tmp_path: Path) -> None:
    configure(["--output", str(tmp_path / ".torchxconfig")])
    line = "run -s local_cwd dist.ddp --env PET_MAX_RESTARTS=0 -- --dataset absent --output run"
    done = torchx(line.split(), cwd=tmp_path, timeout_s=240)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "absent" in done.stderr
    assert not (tmp_path / "run").exists()
