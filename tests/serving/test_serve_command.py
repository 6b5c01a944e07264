"""The command: one line for each mistake, and an orderly end."""

import importlib.util
import json
import signal
import socket
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path

import pytest

from llmgr_rec.errors import UserError
from llmgr_rec.serve import main
from tests.small_run import small_run

ROOT = Path(__file__).parents[2]


def test_a_port_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^port {port} of 127.0.0.1 is in use; give another --port, or 0"):
            main(["--run", str(small_run().run), "--port", str(port)])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--host", "example.com"], "--host example.com is no IP address; give 127.0.0.1"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 is no address of this machine"),
        (["--port", "70000"], "--port is 70000; give 65535 at most"),
        (["--index", "2"], "--index is 2.0; give 1 at most"),
        (["--run", "no/such"], "no/such does not exist"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str) -> None:
    with pytest.raises(UserError) as raised:
        main(["--run", str(small_run().run), "--port", "0", *arguments])
    assert str(raised.value).startswith(line)
    assert "\n" not in str(raised.value)


def test_without_the_extra_the_line_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(UserError, match=r"needs uvicorn; install it: pip install 'llmgr-rec\[serve\]'$"):
        main(["--run", "run"])


@pytest.mark.slow
def test_sigterm_finishes_requests_in_flight() -> None:
    """With a wait of a second, requests are in flight when the signal comes."""
    run = small_run().run / "export" / "sbr"
    command = [sys.executable, "-m", "llmgr_rec.serve", "--run", str(run), "--port", "0", "--wait_ms", "1000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as service:
        try:
            assert service.stdout is not None
            port = int(service.stdout.readline().rsplit(":", 1)[1])
            clients = [HTTPConnection("localhost", port, timeout=60) for _ in range(5)]
            for client in clients:
                body = json.dumps({"sessions": [["i1"]]})
                client.request("POST", "/recommend", body, {"Content-Type": "application/json"})
            # A request that comes later is answered, so all have been received.
            last = HTTPConnection("localhost", port, timeout=60)
            last.request("GET", "/health")
            assert last.getresponse().status == 200
            service.send_signal(signal.SIGTERM)
            answers = [client.getresponse() for client in clients]
            _, said = service.communicate(timeout=60)
        finally:
            service.kill()
    assert [answer.status for answer in answers] == [200] * 5
    assert service.returncode == 143
    assert said.splitlines()[-1] == "stopped by SIGTERM"
