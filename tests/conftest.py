"""What holds for every test."""

import os
import sys

# Tests share the cores with the ranks they start: more threads than cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_sessionfinish() -> None:
    """Workers of pytest-xdist end without what Python does at its exit."""
    if shared := sys.modules.get("tests.small_run"):
        shared.clean_up()
