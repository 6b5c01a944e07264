"""A process ends with its parent, even if the parent is killed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

CHILD = """
import time
from llmgr_rec.parent_process import end_with_parent
end_with_parent()
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
child.wait()
"""


def test_a_child_ends_when_its_parent_is_killed() -> None:
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = sorted(process.stdout.readline().strip() for _ in range(2))
        pid = int(lines[0])
        assert lines[1] == "ready"
        process.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline, "the child runs on"
        time.sleep(0.01)


def test_a_child_whose_parent_has_ended_before_ends() -> None:
    code = "import os; from llmgr_rec.parent_process import end_with_parent; end_with_parent(parent=os.getppid() + 1)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGKILL
