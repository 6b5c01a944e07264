"""The command: one line for each mistake, and an orderly end."""

import importlib.util
import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

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
    answers: list[Any] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as service:
        try:
            assert service.stdout is not None
            address = service.stdout.readline().rsplit(" ", 1)[1].strip()

            def ask() -> None:
                body = json.dumps({"sessions": [["i1"]]}).encode()
                request = Request(f"{address}/recommend", body, {"Content-Type": "application/json"})
                with urlopen(request, timeout=60) as answer:
                    answers.append(json.load(answer))

            threads = [threading.Thread(target=ask) for _ in range(5)]
            for thread in threads:
                thread.start()
            threads[0].join(timeout=0.5)
            service.send_signal(signal.SIGTERM)
            _, said = service.communicate(timeout=60)
        finally:
            service.kill()
    for thread in threads:
        thread.join(timeout=60)
    assert len(answers) == 5
    assert service.returncode == 143
    assert said.splitlines()[-1] == "stopped by SIGTERM"
