"""A real Kubernetes API server on loopback, with etcd, for tests: it stores and validates objects, and runs nothing."""

import json
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.kubernetes.programs import Programs

START_S = 120.0
_STOP_S = 10.0
# The admission of pods that asks for an account, which a controller makes that does not run here.
_DISABLED = "ServiceAccount"


class ApiServer:
    """A client of the server.

    Args:
        url: Its address.
        certificate: File of its certificate, which it has signed itself.
        token: Token of an administrator.
    """

    def __init__(self, url: str, certificate: Path, token: str) -> None:
        self.url = url
        self.certificate = certificate
        self.token = token

    def request(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        """Sends a request and returns the answer, as JSON or text.

        Args:
            method: HTTP method.
            path: Path and query.
            body: JSON value; None sends none.
            kind: Content type of the body.

        Raises:
            urllib.error.HTTPError: The server refuses it.
        """
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.token}", "Content-Type": kind},
        )
        context = ssl.create_default_context(cafile=self.certificate)
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            text = answer.read().decode()
        return json.loads(text) if text.startswith("{") else text

    def write_kubeconfig(self, path: Path, namespace: str) -> None:
        """Writes a client configuration that names this server and nothing else.

        Args:
            path: The file.
            namespace: Namespace of the context.
        """
        cluster = {"server": self.url, "certificate-authority": str(self.certificate)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin", "namespace": namespace}}],
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": self.token}}],
        }
        path.write_text(yaml.safe_dump(config))


@contextmanager
def running_server(programs: Programs, folder: Path) -> Iterator[ApiServer]:
    """The server on free ports of loopback, while the block runs.

    Args:
        programs: The programs.
        folder: Empty folder for the store, certificates and logs.

    Raises:
        RuntimeError: It does not start.
    """
    clients, peers, port = _free_ports(3)
    store, token = f"http://127.0.0.1:{clients}", secrets.token_hex(16)
    key, certificates = folder / "accounts.key", folder / "certificates"
    (folder / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
    _make_key(key)
    etcd = [programs.etcd, "--data-dir", folder / "etcd", "--listen-client-urls", store,
            "--advertise-client-urls", store, "--listen-peer-urls", f"http://127.0.0.1:{peers}"]  # fmt: skip
    server = [
        programs.api_server,
        f"--etcd-servers={store}",
        "--bind-address=127.0.0.1",
        "--advertise-address=127.0.0.1",
        f"--secure-port={port}",
        f"--cert-dir={certificates}",
        f"--token-auth-file={folder / 'tokens.csv'}",
        "--authorization-mode=RBAC",
        f"--disable-admission-plugins={_DISABLED}",
        "--service-cluster-ip-range=10.0.0.0/24",
        "--service-account-issuer=https://127.0.0.1",
        f"--service-account-key-file={key}",
        f"--service-account-signing-key-file={key}",
        "--allow-privileged=true",
    ]
    with ExitStack() as stack:
        processes = [stack.enter_context(_running(words, folder / "log.txt")) for words in (etcd, server)]
        client = ApiServer(f"https://127.0.0.1:{port}", certificates / "apiserver.crt", token)
        _wait_until_ready(client, processes, folder / "log.txt")
        yield client


@contextmanager
def _running(words: Sequence[object], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as file:
        process = subprocess.Popen([str(word) for word in words], stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(server: ApiServer, processes: Sequence[subprocess.Popen[bytes]], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and all(process.poll() is None for process in processes):
        try:
            if server.request("GET", "/readyz") == "ok":
                return
        except OSError:
            # Not listening yet, or not ready, or without its certificate.
            time.sleep(0.2)
    raise RuntimeError(f"the API server does not start: {log.read_text(errors='replace')[-2000:]}")


def _make_key(file: Path) -> None:
    if shutil.which("openssl") is None:
        raise RuntimeError("openssl is missing; fix: apt install openssl")
    subprocess.run(["openssl", "genrsa", "-out", str(file), "2048"], check=True, capture_output=True, timeout=60)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
