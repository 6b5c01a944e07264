"""Loads bundles as if their tables did not fit on each rank."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from llmgr_rec.storage import bundle


def sharded_bundles() -> AbstractContextManager[Any]:
    """Within the block, ranks share the tables of the bundles that they load."""
    return mock.patch.object(bundle, "fits_each_rank", return_value=False)
