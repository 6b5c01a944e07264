"""What happens to rows that cannot be used: they end the conversion, or they are dropped and counted."""

import heapq
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from llmgr_rec.errors import UserError

Policy = Literal["error", "drop"]

# Rows, and kinds of problems, in a message.
_SHOWN = 3
_KINDS = 5
_log = logging.getLogger(__name__)


class BadRows:
    """The bad rows of a file: how many there are of each kind, and the first of them.

    Args:
        source: The file, for messages.
        policy: Whether bad rows are an error or dropped; None if the program cannot drop them.
    """

    def __init__(self, source: Path, policy: Policy | None) -> None:
        self._source = source
        self._policy = policy
        self._counts: Counter[str] = Counter()
        self._first: dict[str, list[tuple[int, str]]] = {}

    @property
    def count(self) -> int:
        """Number of bad rows."""
        return self._counts.total()

    def add(self, problem: str, count: int, first: Iterable[tuple[int, str]]) -> None:
        """Adds rows that have the same problem.

        Args:
            problem: What is wrong, as the end of a sentence.
            count: Number of rows.
            first: Number and value (empty if there is none to show) of the first of them.
        """
        self._counts[problem] += count
        shown = [(number, f"{value!r} {problem}" if value else problem) for number, value in first]
        self._first[problem] = heapq.nsmallest(_SHOWN, [*self._first.get(problem, []), *shown])

    def has(self, problem: str) -> bool:
        """Whether any row has a problem."""
        return problem in self._counts

    def finish(self, rows: int, other_remedy: str = "") -> None:
        """Ends the conversion, or logs what is dropped.

        Args:
            rows: Number of rows of the file, the bad ones included.
            other_remedy: What the user may do instead of correcting or dropping the rows.

        Raises:
            UserError: There are bad rows, and they are an error or all rows are bad.
        """
        if not self.count:
            return
        examples = self._examples()
        shown = "; ".join(f"line {number:,}: {problem}" for number, problem in examples)
        if self._policy != "drop":
            kinds = f": {self._kinds()}" if 1 < len(self._counts) < self.count else ""
            more = f" ({self.count:,} bad rows of {rows:,} in all{kinds})" if self.count > len(examples) else ""
            remedies = ["correct such rows"]
            remedies += ["drop them with --bad_rows drop"] if self._policy else []
            remedies += [other_remedy] if other_remedy else []
            raise UserError(f"{self._source}: {shown}{more}; {', or '.join(remedies)}")
        if self.count == rows:
            raise UserError(f"{self._source}: all {rows:,} rows are bad: {shown}; check the options and the file")
        _log.warning(
            "%s: bad rows dropped: %s of %s (%s); the first are %s",
            self._source,
            f"{self.count:,}",
            f"{rows:,}",
            self._kinds(),
            shown,
        )

    def _examples(self) -> list[tuple[int, str]]:
        """The first rows of the file, but of each kind of problem one before a second of another."""
        turns = ((place, row) for rows in self._first.values() for place, row in enumerate(rows))
        return sorted(row for _, row in heapq.nsmallest(_SHOWN, turns))

    def _kinds(self) -> str:
        """How many rows have which problem."""
        common = self._counts.most_common(_KINDS)
        kinds = [f"{problem.removeprefix('of ')}: {count:,}" for problem, count in common]
        if (rest := self.count - sum(count for _, count in common)) > 0:
            kinds.append(f"others: {rest:,}")
        return ", ".join(kinds)
