"""Ranks that the launcher starts anew find each other, and not the addresses of those that died before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, time
from llmgr_rec.parent_process import end_with_parent
# Ranks die with the launcher.
end_with_parent()
import torch
import torch.distributed as dist
from llmgr_rec.distributed.process_group import init_distributed, shutdown

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
# The rank that comes late has to be waited for, whichever it is.
time.sleep(0.5 * (attempt % 2 == int(os.environ["RANK"])))
world = init_distributed("cpu", 60)
total = torch.tensor([world.rank + 1])
dist.all_reduce(total)
if attempt < 2:
    os.kill(os.getpid(), signal.SIGKILL) if world.rank == attempt % 2 else time.sleep(60)
open(f"sum-{world.rank}", "w").write(str(total.item()))
shutdown()
"""


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_find_each_other_after_each_restart(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    done = subprocess.run(
        [sys.executable, *launcher, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in (0, 1)] == ["3", "3"]
