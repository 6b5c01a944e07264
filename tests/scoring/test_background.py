"""Threads around the model: order, bounds, and failures that come out where they are waited for."""

import threading
import time
from collections.abc import Iterator

import pytest

from llmgr_rec.scoring.background import WriteBehind, read_ahead


def test_reads_ahead_in_order_and_no_further_than_its_depth():
    handed_out = []

    def source() -> Iterator[int]:
        for number in range(20):
            handed_out.append(number)
            yield number

    ahead = read_ahead(source(), 3)
    assert next(ahead) == 0
    time.sleep(0.2)
    assert len(handed_out) <= 1 + 3 + 1
    assert list(ahead) == list(range(1, 20))


def test_a_failure_of_the_source_is_raised_in_its_turn():
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    ahead = read_ahead(source(), 2)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="broken"):
        next(ahead)


def test_a_reader_that_is_left_ends_its_thread():
    def source() -> Iterator[int]:
        while True:
            yield 0

    ahead = read_ahead(source(), 2)
    next(ahead)
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_writes_everything_in_order_before_the_block_ends():
    written = []
    with WriteBehind[int](written.append, 1) as out:
        for number in range(10):
            out.put(number)
    assert written == list(range(10))


def test_a_failed_write_is_raised_and_nothing_follows_it():
    written = []

    def write(number: int) -> None:
        if number == 2:
            raise OSError("full")
        written.append(number)

    def write_all() -> None:
        with WriteBehind[int](write, 1) as out:
            for number in range(50):
                out.put(number)

    with pytest.raises(OSError, match="full"):
        write_all()
    assert written == [0, 1]
