"""Local files: writable checks, atomic replacement, fsync, and the package versions recorded in them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llmgr_rec.errors import UserError

_RECORDED_PACKAGES = (
    "llmgr-rec",
    "torch",
    "torchrec",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "transformers",
    "peft",
    "safetensors",
)


def require_writable(folder: Path, option: str = "--output") -> None:
    """Checks that a folder is writable, or can be created.

    Args:
        folder: Output folder. It and its parents may be missing.
        option: Command-line option that named the folder, for the error message.

    Raises:
        UserError: The folder, or its nearest existing parent, is a file or is not writable.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{option} {folder}: {existing} is a file; give the path of a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{option} {folder}: {existing} is not writable; give another {option}")


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yields the path of a temporary file, which replaces `file` if the block succeeds and is deleted if it fails.

    Does not call fsync: a reader never sees a partial file, but the file may be lost if the machine crashes.

    Args:
        file: File to create or replace. Missing parent folders are created. Several processes may write it at once.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays the same, because some writers choose the format by it.
    partial = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to disk.

    Args:
        path: File or folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_and_fsync(path: Path, text: str) -> None:
    """Writes a text file and flushes it to disk.

    Args:
        path: File to write.
        text: Content of the file.
    """
    path.write_text(text)
    fsync(path)


def installed_versions() -> dict[str, str]:
    """Versions of the installed packages that determine the content of checkpoints and bundles, by package name."""
    versions = {}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
