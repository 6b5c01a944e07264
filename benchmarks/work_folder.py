"""A folder that keeps what a benchmark has done, so that the same command goes on after it was stopped."""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_write

_RECORD = "work.json"


def open_work(folder: Path, options: Mapping[str, Any]) -> Path:
    """Creates a work folder, or opens one that was made with the same options.

    Args:
        folder: The folder.
        options: Options of the benchmark that determine what it keeps in the folder.

    Returns:
        The folder.

    Raises:
        UserError: It was made with other options, whose results would be taken for those of these.
    """
    record, text = folder / _RECORD, json.dumps(dict(options), indent=2) + "\n"
    if record.is_file():
        before = json.loads(record.read_text())
        for name, value in options.items():
            if before.get(name) != value:
                raise UserError(
                    f"--work {folder} was made with --{name} {before.get(name)}, not {value}; give the same, or "
                    "another --work"
                )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(record) as partial:
        partial.write_text(text)
    return folder


def timed(output: Path, command: Callable[[Sequence[str]], None], words: Sequence[str]) -> float:
    """CPU seconds of a command in this process; those of before if its output is there.

    An output without seconds is that of a command that was stopped. It is made again, because its first part was not
    timed.

    Args:
        output: Folder that the command writes.
        command: The command.
        words: Its arguments.
    """
    record = output.with_name(f"{output.name}.seconds.json")
    if not record.is_file():
        shutil.rmtree(output, ignore_errors=True)
        started = time.process_time()
        command(words)
        with atomic_write(record) as partial:
            partial.write_text(json.dumps(time.process_time() - started))
    return float(json.loads(record.read_text()))
