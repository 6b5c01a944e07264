"""The data set that the tests of training share."""

from pathlib import Path

import pytest

from tests.training import small_training


@pytest.fixture(scope="session")
def small_dataset() -> Path:
    return small_training.small_dataset()
