"""Folder of files that are made once per machine and may be deleted at any time."""

import os
from pathlib import Path

from llmgr_rec.errors import UserError
from llmgr_rec.paths import path_problem


def cache_folder() -> Path:
    """Folder of converted models and measurements: $LLMGR_CACHE, or llmgr_rec in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        UserError: $LLMGR_CACHE is not the path of a folder of this machine.
    """
    chosen = os.environ.get("LLMGR_CACHE")
    if chosen:
        if problem := path_problem(chosen):
            raise UserError(f"LLMGR_CACHE is {chosen}; {problem}")
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llmgr_rec"
