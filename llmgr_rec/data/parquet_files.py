"""The Parquet files of an input folder: which are read, which are skipped and why, and their partition columns."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from llmgr_rec.data.delimited_text import conversion_advice, is_delimited_text
from llmgr_rec.errors import UserError

SUFFIXES = (".parquet", ".parq", ".pq")

# How Hive, Spark and DuckDB write a null in the name of a partition folder.
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_HIDDEN = "name starts with . or _"
# Folders that these formats keep beside files, of which some hold rows that were deleted or replaced.
_TABLE_LOGS = {"_delta_log": "Delta Lake", ".hoodie": "Hudi"}
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
    skipped: list[tuple[str, str]] = []
    found = list(_walk(path, (), (os.path.realpath(path),), option, output_marker, skipped))
    # Names without a link come first, so that a file is not read by the name of a link to it.
    by_target: dict[str, tuple[str, ...]] = {}
    for name, _ in sorted(found, key=lambda entry: (entry[1], entry[0])):
        by_target.setdefault(os.path.realpath(path.joinpath(*name)), name)
    read = set(by_target.values())
    for name, _ in found:
        if name not in read:
            first = by_target[os.path.realpath(path.joinpath(*name))]
            skipped.append(("/".join(name), f"same file as {'/'.join(first)}"))
    if not read:
        text = next((name for name, _ in skipped if is_delimited_text(name)), None)
        remedy = conversion_advice(path / text, option) if text else f"give another one to --{option}"
        raise UserError(f"folder {path} has no *.parquet file{_hint(skipped)}; {remedy}")
    files = [ParquetFile(path.joinpath(*name), "/".join(name), _partitions(name[:-1])) for name in sorted(read)]
    return ParquetFiles(tuple(files), tuple(sorted(skipped)))


def _walk(
    root: Path,
    folder: tuple[str, ...],
    ancestors: tuple[str, ...],
    option: str,
    output_marker: str | None,
    skipped: list[tuple[str, str]],
    through_link: bool = False,
) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Yields the name of each Parquet file below a folder, and whether a link leads to it."""
    try:
        entries = sorted(os.scandir(root.joinpath(*folder)), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"--{option}: cannot read folder {root.joinpath(*folder)} ({error.strerror}); change its permissions"
        ) from None
    if folder and output_marker is not None and any(entry.name == output_marker for entry in entries):
        skipped.append(("/".join(folder), "an output of this program"))
        return
    for entry in entries:
        if entry.name in _TABLE_LOGS:
            raise UserError(
                f"--{option}: {root.joinpath(*folder)} is a {_TABLE_LOGS[entry.name]} table, whose files also hold "
                "rows that were deleted or replaced; export its current rows to Parquet files"
            )
        if not _is_text(entry.name):
            raise UserError(
                f"--{option}: a name in {root.joinpath(*folder)} is not UTF-8: {_shown(entry.name)}; rename it"
            )
        name = (*folder, entry.name)
        link = through_link or entry.is_symlink()
        if entry.name.startswith((".", "_")):
            skipped.append(("/".join(name), _HIDDEN))
        elif entry.is_dir():
            target = os.path.realpath(entry.path)
            if target in ancestors:
                skipped.append(("/".join(name), "a link to a folder that contains it"))
            else:
                yield from _walk(root, name, (*ancestors, target), option, output_marker, skipped, link)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            raise UserError(
                f"--{option}: {entry.path} is a link to {os.readlink(entry.path)}, which does not exist; "
                "restore it or delete the link"
            )
        elif not entry.name.lower().endswith(SUFFIXES):
            skipped.append(("/".join(name), "not named *.parquet"))
        elif not entry.is_file():
            skipped.append(("/".join(name), "not a regular file"))
        else:
            yield name, link


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
