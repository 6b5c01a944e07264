"""Counts of page faults, in a process whose allocator no other test has touched."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys
from llmgr_rec.training.freed_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def step():
    blocks = [libc.malloc(20 << 20) for _ in range(3)]
    for block in blocks:
        libc.memset(block, 1, 20 << 20)
    for block in blocks:
        libc.free(block)

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the allocator of glibc is set")
def test_blocks_of_a_step_are_those_of_the_step_before() -> None:
    def faults(word: str) -> int:
        command = [sys.executable, "-c", FAULTS, word]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)

    assert faults("default") > 1000
    assert faults("keep") < 100
