"""What this process is: its run, its rank and its memory."""

import os
import resource
import uuid
from functools import cache
from pathlib import Path

# Where the kernel keeps the memory limit of a container, by version of its control groups.
_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@cache
def run_id() -> str:
    """Id of the launch, equal on all ranks and after restarts; without a launcher, one of this process."""
    return os.environ.get("TORCHELASTIC_RUN_ID") or uuid.uuid4().hex[:12]


def rank() -> int:
    """Rank of this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def memory_bytes() -> int:
    """Memory of the machine, or of the container where it may use less."""
    amounts = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _MEMORY_LIMITS:
        try:
            amounts.append(int(Path(file).read_text()))
        except (OSError, ValueError):
            continue
    return min(amounts)


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
