"""What a command has left in a folder, without what tells of time and place."""

import json
import re
from pathlib import Path

# Files that tell when, and how often, something was done, and caches that a command computes again.
_VOLATILE = re.compile(r"(^|/)(tensorboard/.*|launch|training\.json|checkpoints/.*)$")
# Folders that torchrun and Python's multiprocessing make for themselves, and leave behind if they are killed.
_OF_LIBRARIES = ("torchelastic_", "pymp-")
_TIMES = ("time", "examples_per_s", "data_wait", "memory_mb", "seconds_left")


def contents(folder: Path, output: str) -> dict[str, bytes]:
    """Content of every file of an output by its path in `folder`; empty for files that tell of time only.

    Args:
        folder: Working folder, whose path does not count where files contain it.
        output: File or folder in it.
    """
    root = folder / output
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    found = {}
    for path in files:
        name = str(path.relative_to(folder))
        if not _VOLATILE.search(name):
            found[name] = _without_times(path, path.read_bytes()).replace(str(folder).encode(), b"FOLDER")
    return found


def differences(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Files that are missing, left over or different."""
    return [
        *(f"{name} is missing" for name in sorted(expected.keys() - found.keys())),
        *(f"{name} is left" for name in sorted(found.keys() - expected.keys())),
        *(f"{name} differs" for name in sorted(found.keys() & expected.keys()) if found[name] != expected[name]),
    ]


def leftovers(folder: Path) -> list[str]:
    """Temporary files, locks and unfinished folders that no process needs any more."""
    names = re.compile(r"(^\.tmp-|\.tmp(-|$)|^\.lock$|\.lock$|\.partial$)")
    scratch = [f"tmp/{path.name}" for path in (folder / "tmp").iterdir() if not path.name.startswith(_OF_LIBRARIES)]
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if names.search(path.name)) + scratch


def _without_times(path: Path, content: bytes) -> bytes:
    if path.name == "metrics.json":
        return re.sub(rb'"evaluated": "[^"]*"', b"", content)
    if path.name != "metrics.jsonl":
        return content
    records = [json.loads(line) for line in content.splitlines()]
    return json.dumps(
        [{key: value for key, value in record.items() if key not in _TIMES} for record in records]
    ).encode()
