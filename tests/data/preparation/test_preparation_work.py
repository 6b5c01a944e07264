"""How much work prepare is: counts that are the same on any machine and do not grow with the log."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llmgr_rec.data.preparation import duckdb_database
from llmgr_rec.data.preparation.duckdb_database import DuckDBDatabase
from tests.data.prepare_inputs import Click, prepare
from tests.function_calls import calls_of

# Measured: 33 and 37, of which 7 are streamed. The log is read to check it, for the unit of its times, and for users,
# missing items and clicks; the items to check and to load them.
MOST_STATEMENTS, MOST_STREAMS, MOST_SCANS = 37, 7, {"interactions": 5, "items": 2}


def log(users: int) -> list[Click]:
    """Clicks that the filter keeps: each user on six of 20 items."""
    return [(f"u{user}", f"i{(user + 3 * n) % 20}", 10 * user + n) for user in range(users) for n in range(6)]


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The SQL that a preparation runs."""
    seen: list[str] = []
    run, stream = DuckDBDatabase.run, DuckDBDatabase.stream

    def see(self: Any, query: str) -> Any:
        seen.append(query)
        return run(self, query)

    def see_stream(self: Any, query: str) -> Any:
        seen.append(f"stream {query}")
        return stream(self, query)

    monkeypatch.setattr(duckdb_database.DuckDBDatabase, "run", see)
    monkeypatch.setattr(duckdb_database.DuckDBDatabase, "stream", see_stream)
    return seen


@pytest.mark.parametrize("settings", [{}, {"split": "temporal", "valid_share": 0.2, "test_share": 0.2}])
def test_neither_statements_nor_scans_nor_calls_depend_on_the_log(
    tmp_path: Path, statements: list[str], settings: dict[str, Any]
) -> None:
    seen: list[list[str]] = []
    calls: list[Counter[str]] = []
    for users in (40, 400):
        folder = tmp_path / str(users)
        folder.mkdir()
        work = partial(prepare, folder, log(users), **{"min_interactions": 2} | settings)
        calls.append(calls_of(work))
        seen.append(list(statements))
        statements.clear()
    few, many = seen
    assert len(few) == len(many) <= MOST_STATEMENTS
    assert sum(statement.startswith("stream") for statement in many) <= MOST_STREAMS
    for name, most in MOST_SCANS.items():
        assert 0 < sum(f"{name}.parquet" in statement for statement in many) <= most, name
    # The names of temporary files have one more digit.
    assert calls[1].total() <= 1.1 * calls[0].total(), (calls[1] - calls[0]).most_common(3)
