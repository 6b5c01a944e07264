"""Ranks the requests of a few milliseconds together.

The model takes hardly longer for some sessions than for one, so under load a request costs a fraction of a call.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from llmgr_rec.errors import UserError
from llmgr_rec.serving.served_models import SessionModel

# Sessions that are ranked at once at most; more wait for the next batch.
MAX_BATCH = 128
# Requests that wait for one model at most. At 500 a second they wait 2 s.
_MAX_WAITING = 1000

Row = dict[str, Any]


class BusyError(Exception):
    """Too many requests wait."""


@dataclass(frozen=True)
class Filters:
    """What may be recommended, as the arguments of `Recommender.recommend`."""

    exclude_seen: bool | None = None
    among: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    category: str | None = None
    domain: str | None = None


@dataclass(eq=False)
class Ask:
    """The sessions of one request.

    Args:
        model: The model that ranks.
        sessions: Item ids as text, oldest click first.
        k: Length of the lists.
        filters: What may be recommended.
    """

    model: SessionModel
    sessions: Sequence[Sequence[str]]
    k: int
    filters: Filters = field(default_factory=Filters)


class RequestBatcher:
    """Collects requests until the oldest has waited, or a batch is full, and ranks them in a thread of its own.

    A batcher belongs to an event loop, and so do all of its methods.

    Args:
        wait_s: Time that the oldest request of a batch waits for others, in seconds.
        observe: Called with the number of sessions of each batch.
    """

    def __init__(self, wait_s: float, observe: Callable[[int], None]) -> None:
        self._wait_s = wait_s
        self._observe = observe
        self._waiting: deque[tuple[Ask, asyncio.Future[list[Row]], float]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ranking")
        self._worker: asyncio.Task[None] | None = None

    async def recommend(self, ask: Ask) -> list[Row]:
        """Ranks the sessions of a request, among those of others.

        Returns:
            The records of `Recommender.recommend`, without their session ids.

        Raises:
            UserError: The model refuses the request.
            BusyError: Too many requests wait.
        """
        if len(self._waiting) >= _MAX_WAITING:
            raise BusyError
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Row]] = loop.create_future()
        self._waiting.append((ask, future, loop.time()))
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._rank_all())
        return await future

    def close(self) -> None:
        """Ends the thread, once nothing waits."""
        self._thread.shutdown()

    async def _rank_all(self) -> None:
        """Ranks batch after batch until no request waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            oldest = self._waiting[0][2]
            if sum(len(ask.sessions) for ask, _, _ in self._waiting) < MAX_BATCH:
                await asyncio.sleep(max(oldest + self._wait_s - loop.time(), 0))
            batch = self._take()
            self._observe(sum(len(ask.sessions) for ask, _ in batch))
            try:
                answers = await loop.run_in_executor(self._thread, ranked, [ask for ask, _ in batch])
            except Exception as error:
                answers = [error] * len(batch)
            for (_, future), answer in zip(batch, answers, strict=True):
                if future.cancelled():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    def _take(self) -> list[tuple[Ask, asyncio.Future[list[Row]]]]:
        """The oldest requests, at least one, of `MAX_BATCH` sessions at most."""
        batch: list[tuple[Ask, asyncio.Future[list[Row]]]] = []
        size = 0
        while self._waiting and (not batch or size + len(self._waiting[0][0].sessions) <= MAX_BATCH):
            ask, future, _ = self._waiting.popleft()
            batch.append((ask, future))
            size += len(ask.sessions)
        return batch


def ranked(asks: Sequence[Ask]) -> list[list[Row] | Exception]:
    """Ranks requests, those of the same model and filters together.

    Args:
        asks: The requests.

    Returns:
        The records of each request, or the error with which the model refuses it.
    """
    groups: dict[tuple[int, Filters], list[int]] = {}
    for place, ask in enumerate(asks):
        groups.setdefault((id(ask.model), ask.filters), []).append(place)
    answers: list[list[Row] | Exception] = [[] for _ in asks]
    for places in groups.values():
        for place, answer in zip(places, _ranked_alike([asks[place] for place in places]), strict=True):
            answers[place] = answer
    return answers


def _ranked_alike(asks: Sequence[Ask]) -> list[list[Row] | Exception]:
    """Ranks requests of the same model and filters; one that the model refuses does not make others fail."""
    first = asks[0]
    try:
        rows = _records(first, [session for ask in asks for session in ask.sessions], max(ask.k for ask in asks))
    except UserError as error:
        return [error] if len(asks) == 1 else [answer for ask in asks for answer in _ranked_alike([ask])]
    answers: list[list[Row] | Exception] = []
    for ask in asks:
        answers.append([_cut(row, ask.k) for row in rows[: len(ask.sessions)]])
        del rows[: len(ask.sessions)]
    return answers


def _records(ask: Ask, sessions: Sequence[Sequence[str]], k: int) -> list[Row]:
    filters = ask.filters
    table = ask.model.recommend(
        sessions,
        k,
        exclude_seen=filters.exclude_seen,
        among=filters.among,
        without=filters.without,
        category=filters.category,
        domain=filters.domain,
    )
    rows: list[Row] = table.drop_columns("session_id").to_pylist()
    return rows


def _cut(row: Row, k: int) -> Row:
    return {name: value[:k] if isinstance(value, list) else value for name, value in row.items()}
