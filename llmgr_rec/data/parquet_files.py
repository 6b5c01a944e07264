"""The Parquet files of an input folder: which are read, which are skipped and why, and their partition columns."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from llmgr_rec.data.delimited_text import conversion_advice, is_delimited_text
from llmgr_rec.errors import UserError
from llmgr_rec.remote_path import RemotePath

SUFFIXES = (".parquet", ".parq", ".pq")

# How Hive, Spark and DuckDB write a null in the name of a partition folder.
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_HIDDEN = "name starts with . or _"
# Folders that these formats keep beside files, of which some hold rows that were deleted or replaced.
_TABLE_LOGS = {"_delta_log": "Delta Lake", ".hoodie": "Hudi"}
# Steps from the input folder to a file or folder.
Name = tuple[str, ...]
# Names in a message.
_LISTED = 10


@dataclass(frozen=True)
class ParquetFile:
    """One file of an input.

    Args:
        path: Path of the file.
        name: Path relative to the input folder, with `/`; the file name if the input is a single file.
        partitions: Columns from folder names such as `dt=2026-11-01` between the input folder and the file. Values are
            text; None is the null of Hive.
    """

    path: Path
    name: str
    partitions: dict[str, str | None]


@dataclass(frozen=True)
class ParquetFiles:
    """What an input path consists of.

    Args:
        files: The files to read, in alphabetical order of their names, folder by folder.
        skipped: Name, relative to the input folder, and reason of every file and folder that is not read.
    """

    files: tuple[ParquetFile, ...]
    skipped: tuple[tuple[str, str], ...]

    def describe(self) -> str:
        """Which files are read and which are skipped, in one line; the first few of each by name.

        Hidden files are counted only: `_SUCCESS` and checksum files are in nearly every folder.
        """
        text = (
            f"{len(self.files)} file{'s' * (len(self.files) != 1)} read ({_first_names([f.name for f in self.files])})"
        )
        visible = [f"{name}: {reason}" for name, reason in self.skipped if reason != _HIDDEN]
        hidden = len(self.skipped) - len(visible)
        if visible:
            text += f", {len(visible)} skipped ({_first_names(visible)})"
        return text + (f", {hidden} hidden skipped ({_HIDDEN})" if hidden else "")


def list_parquet_files(path: Path, option: str, output_marker: str | None = None) -> ParquetFiles:
    """Finds the Parquet files of an input: the path itself, or all files in a folder at any depth.

    Links to files and folders are followed. What is reachable by several names is read once, by a name without a link
    if there is one. Names are compared without case: `.parquet`, `.parq` and `.pq`.

    Args:
        path: Parquet file of any name, or a folder.
        option: Command-line option that named the path, without dashes, for messages.
        output_marker: Folders that contain a file of this name are skipped, because they are outputs of this program.

    Raises:
        UserError: The path does not exist, a folder cannot be read, a link is broken, there is no Parquet file, or the
            folder is a table of a format whose files are not all valid.
    """
    if path.is_file():
        return ParquetFiles((ParquetFile(path, path.name, {}),), ())
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a Parquet file or a folder of them to --{option}")
    search = (_RemoteSearch if isinstance(path, RemotePath) else _Search)(path, option, output_marker)
    search.run()
    read, skipped = search.found, search.skipped
    if not read:
        text = next((name for name, _ in skipped if is_delimited_text(name)), None)
        remedy = conversion_advice(path / text, option) if text else f"give another one to --{option}"
        raise UserError(f"folder {path} has no *.parquet file{_hint(skipped)}; {remedy}")
    files = [ParquetFile(path.joinpath(*name), "/".join(name), _partitions(name[:-1])) for name in sorted(read)]
    return ParquetFiles(tuple(files), tuple(sorted(skipped)))


class _Search:
    """Finds what is below a folder, and visits every folder once."""

    def __init__(self, root: Path, option: str, output_marker: str | None) -> None:
        self._root = root
        self._option = option
        self._output_marker = output_marker
        self._folders: list[Name] = [()]
        self._links: list[Name] = []
        # First name of each folder and Parquet file, by its path without links.
        self._names: dict[str, Name] = {str(root) if isinstance(root, RemotePath) else os.path.realpath(root): ()}
        self.found: list[Name] = []
        self.skipped: list[tuple[str, str]] = []

    def run(self) -> None:
        """Fills `found` and `skipped`. Links come last, so that nothing is read by a link that has another name."""
        while self._folders or self._links:
            if self._folders:
                self._visit(self._folders.pop())
            else:
                self._add(self._links.pop(0))

    def _visit(self, folder: Name) -> None:
        path = self._root.joinpath(*folder)
        try:
            with os.scandir(path) as entries:
                content = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(
                f"--{self._option}: cannot read folder {path} ({error.strerror}); change its permissions"
            ) from None
        if folder and any(entry.name == self._output_marker for entry in content):
            self._skip(folder, "an output of this program")
            return
        for entry in content:
            self._check_name(entry.name, path)
            if entry.name.startswith((".", "_")):
                self._skip((*folder, entry.name), _HIDDEN)
            elif entry.is_symlink():
                self._links.append((*folder, entry.name))
            else:
                self._add((*folder, entry.name))

    def _check_name(self, name: str, folder: Path) -> None:
        if name in _TABLE_LOGS:
            raise UserError(
                f"--{self._option}: {folder} is a {_TABLE_LOGS[name]} table, whose files also hold rows that were "
                "deleted or replaced; export its current rows to Parquet files"
            )
        if not _is_text(name):
            raise UserError(f"--{self._option}: a name in {folder} is not UTF-8: {_shown(name)}; rename it")

    def _add(self, name: Name) -> None:
        """Reads a file, skips it, or remembers a folder to visit."""
        path = self._root.joinpath(*name)
        is_folder = path.is_dir()
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"--{self._option}: {path} is a link to {os.readlink(path)}, which does not exist; restore it or "
                "delete the link"
            )
        if not is_folder and not name[-1].lower().endswith(SUFFIXES):
            self._skip(name, "not named *.parquet")
        elif not is_folder and not path.is_file():
            self._skip(name, "not a regular file")
        elif (first := self._names.setdefault(os.path.realpath(path), name)) != name:
            self._skip(name, f"same as {'/'.join(first) or 'the folder itself'}")
        else:
            (self._folders if is_folder else self.found).append(name)

    def _skip(self, name: Name, reason: str) -> None:
        self.skipped.append(("/".join(name), reason))


class _RemoteSearch(_Search):
    """Finds what is below a folder of remote storage, from one list of its files."""

    def run(self) -> None:
        """Fills `found` and `skipped`."""
        names = [path.relative_to(self._root).parts for path in self._root.rglob("*")]
        outputs = {name[:-1] for name in names if name[-1] == self._output_marker and len(name) > 1}
        for name in sorted(names):
            for part in name:
                self._check_name(part, self._root)
            above = [name[:end] for end in range(1, len(name) + 1)]
            hidden = next((part for part in above if part[-1].startswith((".", "_"))), None)
            if output := next((part for part in above if part in outputs), None):
                self._skip_once(output, "an output of this program")
            elif hidden:
                self._skip_once(hidden, _HIDDEN)
            elif not name[-1].lower().endswith(SUFFIXES):
                self._skip(name, "not named *.parquet")
            else:
                self.found.append(name)

    def _skip_once(self, name: Name, reason: str) -> None:
        if ("/".join(name), reason) not in self.skipped[-1:]:
            self._skip(name, reason)


def _partitions(folders: Sequence[str]) -> dict[str, str | None]:
    partitions: dict[str, str | None] = {}
    for folder in folders:
        # Hive escapes characters that a folder name cannot hold, as in a URL.
        column, equals, value = (unquote(part) for part in folder.partition("="))
        if column in partitions:
            raise UserError(f"{'/'.join(folders)}: two folders name column {column}; rename one of them")
        if equals and column:
            partitions[column] = None if value == _NULL_PARTITION else value
    return partitions


def _first_names(names: Sequence[str]) -> str:
    more = [f"and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return ", ".join([*map(_shown, names[:_LISTED]), *more])


def _is_text(name: str) -> bool:
    """Whether a file name is UTF-8; Python shows other bytes as surrogates, which no other program accepts."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _shown(name: str) -> str:
    """A name for a message of one line."""
    return name if name.isprintable() else ascii(name)


def _hint(skipped: Sequence[tuple[str, str]]) -> str:
    others = [f"{name}: {reason}" for name, reason in skipped]
    return f" (skipped {_first_names(others)})" if others else ""
