"""Ctrl-C is one line and exit code 130 at moments at which Python or DuckDB would lose it or print a stack trace."""

import os
import signal
import subprocess
import sys
import time

import pytest

from llmgr_rec.cli import run_cli

EARLY = """
import os, signal, sys
sys.argv[0] = "-m"
import llmgr_rec
os.kill(os.getpid(), signal.SIGINT)
"""


class Finalized:
    """Is interrupted in its finalizer, where Python ignores exceptions."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def in_finalizer(argv: object) -> None:
    Finalized()
    time.sleep(20)


def in_query(argv: object) -> None:
    """As DuckDB 2.0 does it, between the tasks of a query."""
    raise RuntimeError("Query interrupted")


@pytest.mark.parametrize("work", [in_finalizer, in_query])
def test_an_interrupt_is_one_line(work, capsys, monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            run_cli(work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="this process was started with interrupts ignored"
)
def test_an_interrupt_while_a_command_is_imported_is_one_line() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
