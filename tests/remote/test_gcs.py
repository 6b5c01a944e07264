"""Commands on Google Cloud Storage, a server of gcp-storage-emulator on this machine.

Neither it nor gcsfs is in the lock: pip install gcsfs gcp-storage-emulator.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmgr_rec.errors import UserError
from llmgr_rec.remote_path import as_path
from tests.remote.test_remote_commands import prepare, run
from tests.scoring.sessions import all_bytes
from tests.small_run import small_run, write_log

emulator = pytest.importorskip("gcp_storage_emulator.server", reason="needs pip install gcp-storage-emulator")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="needs pip install gcsfs"),
]

BUCKET = "gs://bucket"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty bucket."""
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    host, port = server._api._httpd.server_address
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
    # gcsfs asks over gRPC for the kind of the bucket, which the emulator does not speak.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    monkeypatch.setenv("LLMGR_CACHE", str(tmp_path / "cache"))
    system = importlib.import_module("gcsfs").GCSFileSystem
    system.clear_instance_cache()
    yield
    system.clear_instance_cache()
    server.stop()


def test_commands_on_gcs_write_the_same_bytes(bucket: None, tmp_path: Path) -> None:
    write_log(tmp_path / "raw")
    for file in (tmp_path / "raw").iterdir():
        as_path(f"{BUCKET}/raw/{file.name}").upload(file)  # type: ignore[attr-defined]
    for where in (str(tmp_path), BUCKET):
        prepare(f"{where}/raw", f"{where}/dataset")
        run("score", run=small_run().run, input=f"{where}/dataset/test", output=f"{where}/scores", part_rows=20)
    for name in ("dataset", "scores"):
        folder = as_path(f"{BUCKET}/{name}")
        there = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")}
        assert there == all_bytes(tmp_path / name)
    with pytest.raises(UserError, match="gs://absent/") as raised:
        prepare(str(tmp_path / "raw"), "gs://absent/dataset")
    assert "\n" not in str(raised.value)
