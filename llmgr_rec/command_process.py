"""Runs a command of this package in a process of its own, for callers whose process must not change."""

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping

from llmgr_rec.errors import UserError
from llmgr_rec.log_format import VARIABLE
from llmgr_rec.parent_process import PARENT_VARIABLE

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
# Lines of output that are kept to find the message of an error.
_KEPT_LINES = 50
# Seconds that a command has to end in order once its caller is interrupted.
_STOP_S = 10.0


def run_command(
    command: str, options: Mapping[str, object], on_line: Callable[[str], object] | None = None, bars: bool = False
) -> None:
    """Runs `python -m llmgr_rec.COMMAND`. The command ends with this call, also if an exception or a kill ends it.

    Args:
        command: Name of the command.
        options: Values by name of the option; lists and mappings become JSON.
        on_line: Called with each line that the command prints, without its line break.
        bars: Whether the command shows progress bars on the terminal of this process.

    Raises:
        UserError: The command failed; the message is its own.
    """
    environment = _environment(bars)
    words = [f"--{name}={_text(value)}" for name, value in options.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", f"llmgr_rec.{command}", *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    lines: deque[str] = deque(maxlen=_KEPT_LINES)
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            if on_line is not None:
                on_line(lines[-1])
        code = process.wait()
    except BaseException:
        _end(process)
        raise
    finally:
        process.stdout.close()
    if code:
        raise UserError(f"{command} failed: {_message(lines) or f'exit code {code}'}")


def own_and_given(own: Mapping[str, object], given: Mapping[str, object], argument: str) -> dict[str, object]:
    """Options of a command: those that the caller of this package gives, and those that this package sets.

    Args:
        own: Options that this package sets.
        given: Options that the caller gives.
        argument: Name of the argument with these, for messages.

    Raises:
        UserError: An option is in both.
    """
    if taken := sorted(set(own) & set(given)):
        raise UserError(f"{argument} has {taken[0]}, which is set from the other arguments; remove it")
    return {**given, **own}


def _environment(bars: bool) -> dict[str, str]:
    """The environment of the command; of a process that torchrun started, the command is no rank."""
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    environment[PARENT_VARIABLE] = str(os.getpid())
    # Its messages are read here.
    environment.pop(VARIABLE, None)
    if bars and sys.stderr.isatty():
        environment.setdefault("LLMGR_TERMINAL", os.ttyname(sys.stderr.fileno()))
    return environment


def _text(value: object) -> str:
    return json.dumps(value) if value is None or isinstance(value, list | dict | bool) else str(value)


def _message(lines: deque[str]) -> str:
    said = [line for line in lines if line.strip()]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    return (errors or said or [""])[-1]


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()
