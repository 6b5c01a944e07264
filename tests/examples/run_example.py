"""Runs an example as a user does: as a module, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Seconds after which an example is killed. It takes a small part of it on an idle machine.
TIMEOUT_S = 240


def run_example(name: str, *arguments: str, ranks: int = 1, folder: Path = ROOT) -> str:
    """Runs `python -m examples.NAME`, under torchrun for several ranks, and returns what it printed.

    Args:
        name: Module in `examples`.
        arguments: Command-line arguments.
        ranks: Number of processes.
        folder: Working folder.
    """
    launcher = [] if ranks == 1 else ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    command = [sys.executable, "-m", *launcher, f"examples.{name}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout
