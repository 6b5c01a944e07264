"""Load test of the service: clients over loopback that each send the next request when the last is answered.

```sh
python -m benchmarks.serving --run runs/ml/default
```

The service runs in a process of its own, as `python -m llmgr_rec.serve` starts it. The client is one process with raw
connections that are kept open, so that it takes little of the processors' time; it reads status and length of each
answer.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import benchmark_parser, write_report
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.errors import UserError
from llmgr_rec.paths import LocalPath

_START_S = 300.0
_CLICKS = (1, 30)
_SESSIONS = 500


def main(argv: Sequence[str]) -> None:
    """Parses the arguments, starts the service and measures."""
    parser = benchmark_parser("serving", "Measures requests a second and their times.", "--run run")
    parser.add_argument("--run", type=LocalPath, required=True, help="Run folder to serve.")
    parser.add_argument("--clients", type=int, default=50, help="Clients that ask at the same time.")
    parser.add_argument("--seconds", type=float, default=60.0, help="Duration.")
    args = parse_args(parser, argv).as_dict()
    if args["clients"] < 1 or not 0 < args["seconds"] < 86400:
        raise UserError("--clients and --seconds must be positive; give --clients 50 --seconds 60")
    results = measure(Path(args["run"]), args["clients"], args["seconds"])
    print(summary(results))
    write_report(args["output"], args, results)


def measure(run: Path, clients: int, seconds: float) -> dict[str, Any]:
    """Serves a run and asks it.

    Args:
        run: Run folder.
        clients: Number of clients.
        seconds: Duration.
    """
    command = [sys.executable, "-m", "llmgr_rec.serve", "--run", str(run), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        try:
            assert service.stdout is not None
            line = service.stdout.readline()
            if "http://" not in line:
                raise UserError(f"the service did not start; see what python -m llmgr_rec.serve --run {run} says")
            port = int(line.rsplit(":", 1)[1])
            requests = make_requests(_catalog(port))
            asyncio.run(ask(port, requests, clients, seconds=1.0))
            before = cpu_seconds(service.pid)
            started, own = time.perf_counter(), time.process_time()
            times, errors = asyncio.run(ask(port, requests, clients, seconds))
            elapsed = time.perf_counter() - started
            cpu = cpu_seconds(service.pid) - before
            own = time.process_time() - own
        finally:
            service.terminate()
            service.wait(timeout=_START_S)
    count = len(times)
    return {
        "requests": count,
        "errors": errors,
        "requests_per_s": count / elapsed,
        "p50_ms": float(np.percentile(times, 50)) * 1000,
        "p99_ms": float(np.percentile(times, 99)) * 1000,
        "service_cpu_ms": cpu / count * 1000,
        "client_cpu_ms": own / count * 1000,
        "exit_code": service.returncode,
    }


def summary(results: dict[str, Any]) -> str:
    """The results in two lines."""
    return (
        "{requests:,} requests, {errors} errors, {requests_per_s:.0f} requests/s, p50 {p50_ms:.0f} ms, "
        "p99 {p99_ms:.0f} ms\n"
        "processor time of a request: service {service_cpu_ms:.2f} ms, client {client_cpu_ms:.2f} ms"
    ).format(**results)


def make_requests(ids: Sequence[str]) -> list[bytes]:
    """HTTP requests with sessions of random items, of 1 to 30 clicks each."""
    rng = np.random.default_rng(0)
    requests = []
    for _ in range(_SESSIONS):
        clicks = rng.choice(ids, size=int(rng.integers(*_CLICKS, endpoint=True)))
        body = json.dumps({"sessions": [clicks.tolist()], "k": 10}).encode()
        head = ("POST /recommend HTTP/1.1", "Host: localhost", "Content-Type: application/json")
        requests.append("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
    return requests


async def ask(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> tuple[list[float], int]:
    """Seconds of each answer, and the number of requests without one or with another status than 200.

    Args:
        port: Port of the service.
        requests: HTTP requests, asked in turns.
        clients: Number of clients.
        seconds: Duration.
    """
    times: list[float] = []
    errors = 0
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        nonlocal errors
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        turn = number
        while (started := time.perf_counter()) < end:
            writer.write(requests[turn % len(requests)])
            turn += clients
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0]
            await reader.readexactly(int(length))
            times.append(time.perf_counter() - started)
            errors += not head.startswith(b"HTTP/1.1 200")
        writer.close()

    for failed in await asyncio.gather(*map(client, range(clients)), return_exceptions=True):
        if isinstance(failed, (OSError, asyncio.IncompleteReadError)):
            errors += 1
        elif failed is not None:
            raise failed
    return times, errors


def cpu_seconds(process: int) -> float:
    """Processor time of a process, user and system."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def _catalog(port: int) -> list[str]:
    """Ids of the most popular items."""
    from urllib.request import urlopen

    with urlopen(f"http://127.0.0.1:{port}/items?limit=100", timeout=30) as answer:
        return [str(item["item_id"]) for item in json.load(answer)["items"]]


if __name__ == "__main__":
    run_cli(main)
