"""Signals end a process within its grace period, with its clean-up, at a place of its choice."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from llmgr_rec.cli import run_cli
from llmgr_rec.errors import StopRequested
from llmgr_rec.stop_signals import StopSignals


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A shell in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_is_raised_where_it_arrives_or_at_the_end_of_a_block() -> None:
    reached = []
    with StopSignals(60), pytest.raises(StopRequested, match="stopped by SIGTERM"):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("after the signal")
    with StopSignals(60) as signals, pytest.raises(StopRequested) as stop:  # noqa: PT012
        assert signals.requested == 0
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("end of the block")
            assert signals.requested == signal.SIGINT
        reached.append("after the block")
    assert stop.value.exit_code == 130
    assert reached == ["end of the block"]


def test_only_a_second_interrupt_does_not_wait() -> None:
    with StopSignals(60) as signals, pytest.raises(StopRequested) as stop, signals.deferred():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal was not noticed")
    assert stop.value.exit_code == 143


def test_clean_up_is_not_disturbed_by_a_repeated_signal() -> None:
    cleaned = []
    with StopSignals(60), pytest.raises(StopRequested):  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append("all")
    assert cleaned == ["all"]


def test_the_handlers_from_before_return() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals(60):
        pass
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_sigterm_ends_a_command_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        run_cli(lambda argv: os.kill(os.getpid(), signal.SIGTERM))
    assert end.value.code == 143
    assert capsys.readouterr().err == "stopped by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 143, "stopped by SIGTERM\n"), (signal.SIGINT, 130, "error: interrupted\n")],
)
def test_a_signal_in_a_query_of_duckdb_is_no_failure(
    capsys: pytest.CaptureFixture[str], number: int, code: int, said: str
) -> None:
    def query(argv: object) -> None:
        # What DuckDB does with an exception of a signal handler in a query.
        try:
            os.kill(os.getpid(), number)
        except BaseException:
            raise RuntimeError("Query interrupted") from None

    with pytest.raises(SystemExit) as end:
        run_cli(query)
    assert end.value.code == code
    assert capsys.readouterr().err == said


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals(60):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


# A wait in C, as that for another rank, which goes on after a signal; so no handler can run.
STUCK = """
import ctypes
from llmgr_rec.stop_signals import StopSignals
with StopSignals(0.5):
    print("ready", flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_the_grace_period_ends_a_process_that_is_stuck() -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=-1, stderr=-1, text=True) as stuck:
        try:
            assert stuck.stdout is not None
            assert stuck.stderr is not None
            assert stuck.stdout.readline() == "ready\n"
            time.sleep(0.2)
            stuck.terminate()
            assert stuck.wait(60) == 143
            assert stuck.stderr.read() == (
                "stopped by SIGTERM, but not ready after 0.5 s; ended without further checkpoint\n"
            )
        finally:
            stuck.kill()
