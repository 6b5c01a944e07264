"""Results on disk: whether their place can be written to, asked before any work is done, and files that are never half.

What has to survive a crash of the machine, too, is written by `llmgr_rec.distributed.durable`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmgr_rec.errors import UserError


def require_writable(folder: Path, option: str = "--output") -> None:
    """Lets a folder pass that is there and writable, or that can be made.

    Args:
        folder: Folder to write in; it and folders above it may be missing.
        option: What the user gave it by.

    Raises:
        UserError: It, or the nearest folder above it that exists, is a file or not writable.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{option} {folder}: {existing} is a file; give the path of a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{option} {folder}: {existing} is not writable; give another {option}")


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Gives a file to write beside another, which it replaces when it is whole; where writing fails, it is deleted.

    Args:
        file: File to make or to replace; folders above it are made. Two processes may write it at once.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # With the same end, by which some writers choose their format.
    partial = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
