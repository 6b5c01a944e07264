"""Paths that the user names: files and folders of this machine and, where an option takes them, of remote storage."""

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmgr_rec.errors import UserError

if TYPE_CHECKING:
    LocalPath = str
    StoragePath = str
else:

    class LocalPath(str):
        """Type of a command-line option that is a path; the value is a `str` that `local_path` has checked."""

    class StoragePath(str):
        """Type of an option that is a path or a remote URL; the value is a `str` that `storage_path` has checked."""


# One slash is enough, because Path makes s3:/b of s3://b.
_REMOTE = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):/")
_LIKE_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
# Schemes of remote storage. A program may register others with fsspec, and import their file systems, before.
_SCHEMES = ("s3", "s3a", "gs", "gcs", "hdfs", "memory")
# Longest name of a file or folder, in bytes, of the usual file systems.
_LONGEST_NAME = 255


def text_problem(text: str) -> str:
    """What to give instead of a text; empty where it can be stored.

    Args:
        text: The text, as the user wrote it.
    """
    if "\0" in text:
        return "leave out the null character"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "give text in UTF-8"
    return ""


def path_problem(text: str) -> str:
    """What to give instead of a path; empty where it may name a file or folder of this machine.

    Args:
        text: The path, as the user wrote it.
    """
    if not text.strip():
        return "give the path of a file or folder"
    if remote := _REMOTE.match(text):
        if remote[1].lower() == "file":
            return f"leave out {remote[1]}://, because this is an address and not a path"
        return "give a path on this machine, because remote storage is not supported here"
    if problem := text_problem(text):
        return problem
    if any(len(name.encode()) > _LONGEST_NAME for name in text.split("/")):
        return f"give a path of names of at most {_LONGEST_NAME} bytes"
    if text.startswith("~") and os.path.expanduser(text) == text:
        return f"give the name of a user of this machine after ~, or ./{text} for a folder of that name"
    return ""


def local_path(value: Any) -> str:
    """Checks the value of an option, puts the home folder for a leading ~, and makes `md:data` absolute.

    Args:
        value: The value.

    Raises:
        ValueError: It is not the path of a file or folder of this machine.
    """
    problem = path_problem(value) if isinstance(value, str) else "give the path of a file or folder"
    if problem:
        shown = value if isinstance(value, str) and value and value.isprintable() else repr(value)
        raise ValueError(f"{shown}; {problem}")
    path = os.path.expanduser(value)
    # pyarrow takes a relative path such as md:data for an address.
    return os.path.abspath(path) if _LIKE_ADDRESS.match(path) else path


def is_remote(text: str) -> bool:
    """Whether a text is the URL of remote storage, and not a path.

    Args:
        text: The text, as the user wrote it.
    """
    return _REMOTE.match(text) is not None


def url_problem(url: str) -> str:
    """What to give instead of the URL of remote storage; empty where it may name a file or folder there.

    Args:
        url: The URL, as the user wrote it.
    """
    scheme, _, rest = url.partition("://")
    if not _has_scheme(scheme):
        return "give s3://, gs://, hdfs:// or memory://, or a path on this machine"
    if "@" in rest or "?" in rest:
        return "leave out keys and options; give credentials in the environment or profile of the client of the storage"
    if not rest.strip("/") or rest.startswith("/"):
        return f"give {scheme}://HOST/FOLDER" if scheme == "hdfs" else f"give {scheme}://BUCKET/FOLDER"
    if found := set(rest) & set("*[]#\\\n\r"):
        return f"leave out {sorted(found)[0]!r}"
    if {".", ".."} & set(rest.split("/")):
        return "leave out . and .."
    return text_problem(url)


def _has_scheme(scheme: str) -> bool:
    fsspec = sys.modules.get("fsspec")
    return scheme in _SCHEMES or (fsspec is not None and scheme in fsspec.registry and scheme not in ("file", "local"))


def storage_path(value: Any) -> str:
    """Checks the value of an option that is a path, as `local_path` does, or the URL of remote storage.

    Args:
        value: The value.

    Raises:
        ValueError: It is neither. The message has nothing of a URL that may contain keys.
    """
    if not isinstance(value, str) or not is_remote(value) or value.lower().startswith("file:"):
        return local_path(value)
    if problem := url_problem(value):
        shown = f"{value.partition('://')[0]}://..." if "@" in value or "?" in value else value
        raise ValueError(f"{shown if shown.isprintable() else repr(shown)}; {problem}")
    return value


def check_inside(folder: Path, names: Iterable[str], source: Path) -> None:
    """Checks that files which a folder lists as its own lie in it, so that a folder from elsewhere opens no other file.

    Args:
        folder: The folder.
        names: Paths relative to it.
        source: File that lists them, for the message.

    Raises:
        UserError: A name is absolute, leads out of the folder, or is a link to a file outside.
    """
    root = folder.resolve()
    for name in names:
        if not isinstance(name, str) or path_problem(name) or not (root / name).resolve().is_relative_to(root):
            raise UserError(f"{source}: {name!r} is not a file within {folder}; make or copy the folder again")
