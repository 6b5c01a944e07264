"""Whether a place that a user names for results can be written to, asked before any work is done."""

import os
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
