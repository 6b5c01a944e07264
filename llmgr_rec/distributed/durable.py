"""What checkpoints and bundles share: bytes that survive a crash, and the versions they were written by."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("llmgr-rec", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "transformers", "peft", "safetensors")


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide what is written; those that are not installed are left out."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_synced(path: Path, text: str) -> None:
    """Writes a text file that is on disk when the call returns.

    Args:
        path: File to write.
        text: Its content.
    """
    path.write_text(text)
    sync(path)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk.

    Args:
        path: File or folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
