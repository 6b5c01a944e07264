"""Configuration of all tests."""

import logging
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Tests share the cores with the ranks that they start; more threads than cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Each test makes its own results, except those of the cache.
os.environ.setdefault("LLMGR_CACHE_GB", "0")


# A deadline is wall-clock time per example, which a busy machine exceeds.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(autouse=True)
def _logging_reaches_pytest() -> None:
    """A command that ran in this process before has set up the logging of the whole process."""
    logger = logging.getLogger("llmgr_rec")
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


# The files that take longest, the longest first.
LONGEST_FILES = [
    "experiments/test_process_pool.py",
    "training/test_resume.py",
    "training/test_fsdp.py",
    "distributed/test_fsdp.py",
    "training/test_learning.py",
    "training/test_text_embeddings.py",
    "torchx/test_local_run.py",
    "scoring/test_consistency.py",
    "training/test_sbr_one_pass.py",
    "examples/test_llm_stage.py",
    "data/preparation/test_real_data.py",
    "benchmarks/test_quality_cost.py",
    "training/test_stages.py",
    "examples/test_minimal.py",
    "training/test_id_row_smoothing.py",
    "examples/test_rank_with_sessions.py",
    "test_extensions.py",
    "training/test_held_out.py",
    "experiments/test_run_experiment.py",
    "datagen/test_docs.py",
]
_TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts the longest files first, so that no worker of pytest-xdist has one left when the others have ended."""
    places = {_TESTS / name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_sessionfinish() -> None:
    """Deletes shared files here, because workers of pytest-xdist exit without running atexit handlers."""
    if shared := sys.modules.get("tests.small_run"):
        shared.clean_up()
