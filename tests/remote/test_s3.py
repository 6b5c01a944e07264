"""Commands on S3, a server of moto on this machine.

moto and s3fs are not in the lock: pip install s3fs 'moto[server]'.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmgr_rec.errors import UserError
from llmgr_rec.remote_path import as_path
from llmgr_rec.storage.bundle import load_bundle
from tests.remote.test_remote_commands import TRAINING, prepare, run
from tests.scoring.sessions import all_bytes, raw_sessions, write_sessions
from tests.small_run import small_run, write_log

moto_server = pytest.importorskip("moto.server", reason="needs pip install 'moto[server]'")
s3fs = pytest.importorskip("s3fs", reason="needs pip install s3fs")
pytestmark = pytest.mark.slow

BUCKET = "s3://bucket"
SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def s3(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A file system with an empty bucket."""
    variables = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "LLMGR_CACHE": str(tmp_path / "cache"),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _post(f"{server}/moto-api/reset")
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem(use_listings_cache=False)
    system.mkdir("bucket")
    yield system
    s3fs.S3FileSystem.clear_instance_cache()


def _post(url: str, body: bytes = b"") -> None:
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "text/plain"}, method="POST")
    urllib.request.urlopen(request, timeout=10).close()


def upload(folder: Path, name: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            (as_path(f"{BUCKET}/{name}") / file.relative_to(folder)).upload(file)  # type: ignore[attr-defined]


def remote_bytes(name: str) -> dict[str, bytes]:
    folder = as_path(f"{BUCKET}/{name}")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")}


def test_commands_on_s3_write_the_same_bytes(
    s3: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        write_log(tmp_path / "raw")
        upload(tmp_path / "raw", "raw")
        for where in (str(tmp_path), BUCKET):
            prepare(f"{where}/raw", f"{where}/dataset")
        assert remote_bytes("dataset") == all_bytes(tmp_path / "dataset")
        settings = {**TRAINING, "runtime.reader_workers": "1"}
        for where in (str(tmp_path), BUCKET):
            run("train", dataset=f"{where}/dataset", output=f"{where}/run", **settings)
            run("score", run=f"{where}/run", input=f"{where}/dataset/test", output=f"{where}/scores", part_rows=30)
            run("evaluate", run=f"{where}/run", dataset=f"{where}/dataset", output=f"{where}/metrics.json")
        run("report", run=f"{BUCKET}/run", metrics=f"{BUCKET}/metrics.json", output=f"{BUCKET}/report")
    weights = {name: content for name, content in remote_bytes("run/export").items() if name.endswith(".safetensors")}
    assert weights
    assert weights == {name: all_bytes(tmp_path / "run/export")[name] for name in weights}
    assert all(remote_bytes("scores")[name] == all_bytes(tmp_path / "scores")[name] for name in ["part-00000.parquet"])
    assert load_bundle(f"{BUCKET}/run").stage == "sbr"
    told = json.loads(as_path(f"{BUCKET}/metrics.json").read_text())
    here = json.loads((tmp_path / "metrics.json").read_text())
    assert told["test"] == here["test"]
    said = caplog.text + "".join(capsys.readouterr())
    written = b"".join(content for name in ("run", "scores", "report") for content in remote_bytes(name).values())
    assert "s3://bucket/run" in said
    assert SECRET not in said
    assert SECRET.encode() not in written
    assert os.environ["AWS_ACCESS_KEY_ID"].encode() not in written


def test_scoring_killed_on_s3_goes_on(s3: Any, tmp_path: Path) -> None:
    source = write_sessions(tmp_path / "in.parquet", raw_sessions(400))
    as_path(f"{BUCKET}/in.parquet").upload(source)  # type: ignore[attr-defined]
    options = {"run": str(small_run().run), "stage": "sbr", "part_rows": 10}
    run("score", input=source, output=tmp_path / "whole", **options)
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "llmgr_rec.score", *words, "--input", f"{BUCKET}/in.parquet"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([*command, "--output", f"{BUCKET}/scores"], env=environment)
    try:
        deadline = time.monotonic() + 120
        while not s3.exists("bucket/scores/part-00002.parquet") and time.monotonic() < deadline:
            time.sleep(0.02)
            assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    parts = [name for name in remote_bytes("scores") if name.startswith("part-")]
    assert 3 <= len(parts) < 40
    assert "_SUCCESS" not in remote_bytes("scores")
    before = {name: s3.info(f"bucket/scores/{name}")["ETag"] for name in parts}
    changed = {name: s3.info(f"bucket/scores/{name}")["LastModified"] for name in parts}
    run("score", input=f"{BUCKET}/in.parquet", output=f"{BUCKET}/scores", **options)
    assert remote_bytes("scores") == all_bytes(tmp_path / "whole")
    assert before == {name: s3.info(f"bucket/scores/{name}")["ETag"] for name in parts}
    assert changed == {name: s3.info(f"bucket/scores/{name}")["LastModified"] for name in parts}


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("bucket", "s3://absent/.*: the bucket does not exist; create it"),
        ("unknown key", "s3://bucket/.*(does not know the credentials|permission denied)"),
        ("permission", "s3://bucket/.*: permission denied; use credentials"),
        ("none", "s3://bucket/.*: there are no credentials"),
        ("network", "s3://bucket/.*: the storage cannot be reached; check the network"),
    ],
)
def test_an_error_of_s3_is_one_line(
    s3: Any, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, said: str
) -> None:
    write_log(tmp_path / "raw")
    output = "s3://absent/dataset" if case == "bucket" else f"{BUCKET}/dataset"
    if case == "permission":
        users = pytest.importorskip("boto3").client("iam")
        users.create_user(UserName="nobody")
        key = users.create_access_key(UserName="nobody")["AccessKey"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    if case in ("unknown key", "permission"):
        _post(f"{server}/moto-api/reset-auth", b"0")
    if case == "none":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    if case == "network":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(UserError, match=said) as raised:
            prepare(str(tmp_path / "raw"), output)
        with pytest.raises(UserError, match="s3://"):
            prepare(f"{output}/raw", str(tmp_path / "dataset"))
    finally:
        _post(f"{server}/moto-api/reset-auth", b"inf")
    assert SECRET not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "dataset").exists()
    shutil.rmtree(tmp_path / "raw")
