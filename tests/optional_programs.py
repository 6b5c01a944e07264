"""Marks for tests that need programs which the lock does not have."""

import importlib.util
import shutil

import pytest


def _lacks(package: str) -> bool:
    return importlib.util.find_spec(package) is None


needs_spark = pytest.mark.skipif(
    _lacks("pyspark") or _lacks("sqlglot") or shutil.which("java") is None,
    reason="needs pip install 'pyspark>=4.2,<5' 'sqlglot>=30,<31', and apt install openjdk-17-jre-headless",
)
needs_ray = pytest.mark.skipif(_lacks("ray"), reason="needs pip install 'ray[data]>=2.50,<3'")
