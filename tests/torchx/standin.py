"""A stand-in for the API server of a cluster: keeps jobs in memory and answers the requests that TorchX makes.

It is not Kubernetes: nothing is validated and nothing runs. It shows that what TorchX sends arrives under the right
paths and that answers are understood; whether a cluster would take the job is another question.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

JOBS = re.compile(
    r"^/apis/batch\.volcano\.sh/v1alpha1/namespaces/(?P<namespace>[^/]+)/jobs(?:/(?P<name>[^/]+))?(?P<status>/status)?$"
)
LOG = re.compile(r"^/api/v1/namespaces/(?P<namespace>[^/]+)/pods/(?P<pod>[^/]+)/log$")


class StandIn(ThreadingHTTPServer):
    """The server; tests read `jobs` and `requests`, set `refusal`, and set a job's status, as a controller would."""

    daemon_threads = True

    def __init__(self) -> None:
        self.jobs: dict[tuple[str, str], dict[str, Any]] = {}
        self.requests: list[tuple[str, str]] = []
        # Message with which new jobs are refused, if it is set.
        self.refusal = ""
        super().__init__(("127.0.0.1", 0), _Handler)

    def set_phase(self, namespace: str, name: str, phase: str) -> None:
        """Plays the controller: gives a job and its tasks a phase."""
        job = self.jobs[namespace, name]
        counts = {task["name"]: {"phase": {phase: 1}} for task in job["spec"]["tasks"]}
        job["status"] = {"state": {"phase": phase}, "taskStatusCount": counts}


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        path = self._noted()
        if (match := LOG.match(path)) is not None:
            self._answer(200, f"2026-01-01T00:00:00Z words of {match['pod']}\n".encode(), "text/plain")
        elif (match := JOBS.match(path)) is not None and match["name"]:
            self._send_job(match["namespace"], match["name"])
        elif match is not None:
            items = [job for (namespace, _), job in self.server.jobs.items() if namespace == match["namespace"]]
            self._send(200, {"kind": "JobList", "items": items})
        else:
            self._send(404, {"kind": "Status", "reason": "NotFound"})

    def do_POST(self) -> None:
        match = JOBS.match(self._noted())
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if match is None:
            self._send(404, {"kind": "Status", "reason": "NotFound"})
        elif self.server.refusal:
            self._send(422, {"kind": "Status", "reason": "Invalid", "message": self.server.refusal})
        else:
            self.server.jobs[match["namespace"], body["metadata"]["name"]] = body
            self._send(201, body)

    def do_DELETE(self) -> None:
        match = JOBS.match(self._noted())
        job = self.server.jobs.pop((match["namespace"], match["name"]), None) if match else None
        self._send(200 if job else 404, {"kind": "Status", "status": "Success" if job else "Failure"})

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _noted(self) -> str:
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path))
        return path

    def _send_job(self, namespace: str, name: str) -> None:
        job = self.server.jobs.get((namespace, name))
        self._send(200 if job else 404, job or {"kind": "Status", "reason": "NotFound"})

    def _send(self, code: int, body: dict[str, Any]) -> None:
        self._answer(code, json.dumps(body).encode(), "application/json")

    def _answer(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving() -> Iterator[StandIn]:
    """The stand-in on a free loopback port, while the block runs."""
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def write_kubeconfig(path: Path, server: StandIn, namespace: str) -> None:
    """A client configuration that names the stand-in and nothing else."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "stand-in",
        "contexts": [
            {"name": "stand-in", "context": {"cluster": "stand-in", "user": "nobody", "namespace": namespace}}
        ],
        "clusters": [{"name": "stand-in", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "nobody", "user": {}}],
    }
    path.write_text(yaml.safe_dump(config))
