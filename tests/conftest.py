"""Configuration of all tests."""

import os
import sys

from hypothesis import settings

# Tests share the cores with the ranks that they start; more threads than cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# A deadline is wall-clock time per example, which a busy machine exceeds.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


def pytest_sessionfinish() -> None:
    """Deletes shared files here, because workers of pytest-xdist exit without running atexit handlers."""
    if shared := sys.modules.get("tests.small_run"):
        shared.clean_up()
