"""Results of commands that later commands take over: converted files, data sets, tokens and text embeddings of items.

A result is a folder of files in the cache folder, named by a digest of all that it depends on: contents of the inputs,
settings, code of this package and versions of libraries. A change of any of them gives another name, so a result is
never out of date. Its files are verified by their checksums before they are used. Whatever goes wrong with the cache,
the command makes the result itself.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmgr_rec.cache import cache_folder
from llmgr_rec.checksums import file_checksum, verify_file
from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_folder, atomic_write, remove_stale
from llmgr_rec.paths import check_inside

logger = logging.getLogger(__name__)

LIMIT_VARIABLE = "LLMGR_CACHE_GB"
DEFAULT_LIMIT_GB = 5.0
_ENTRY = "entry.json"
# Share of the free space of the disk, and of the limit, that one result may take.
_LARGEST_SHARE = 0.5

# Name of a logger, level and text.
Message = tuple[str, int, str]


def results_folder() -> Path:
    """Folder of the results: `results` in the cache folder.

    Raises:
        UserError: $LLMGR_CACHE is not the path of a folder of this machine.
    """
    return cache_folder() / "results"


def _has_folder() -> bool:
    """Whether there is a cache folder; users of containers may have no home folder."""
    try:
        results_folder()
    except RuntimeError:
        logger.info("there is no home folder, so nothing is kept for later commands; set LLMGR_CACHE to a folder")
        return False
    return True


def limit_bytes() -> int:
    """Bytes that the results may take together: $LLMGR_CACHE_GB GiB, 5 by default. 0 disables the cache.

    Raises:
        UserError: The variable is not a number of GiB.
    """
    text = os.environ.get(LIMIT_VARIABLE) or str(DEFAULT_LIMIT_GB)
    try:
        gibibytes = float(text)
        if not 0 <= gibibytes < 1 << 30:
            raise ValueError
    except ValueError:
        raise UserError(f"{LIMIT_VARIABLE} is {text}; give a number of GiB, or 0 to keep no results") from None
    return int(gibibytes * 2**30)


class CachedResult:
    """A result by all that it depends on.

    Args:
        kind: What it is, in words, for its name and for messages.
        inputs: Settings that it depends on, as JSON values.
        sources: Files that it is made from. If they are larger than the limit of the cache, it is not used.
        packages: Packages whose versions the result depends on.
        code: Folders of code that it depends on, besides this package.
        paths: Paths with which messages may begin, in the order in which they are given. The result does not depend on
            them.
    """

    def __init__(
        self,
        kind: str,
        inputs: Mapping[str, Any],
        sources: Sequence[Path] = (),
        packages: Sequence[str] = (),
        code: Iterable[Path] = (),
        paths: Sequence[str] = (),
    ) -> None:
        self._kind, self._sources, self._paths = kind, sources, paths
        limit = limit_bytes()
        self._is_enabled = 0 < limit >= sum(file.stat().st_size for file in sources) and _has_folder()
        if not self._is_enabled:
            return
        self._states = self._state_of_sources()
        key = {
            "inputs": inputs,
            "sources": [file_checksum(file) for file in sources],
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "code": [_code_checksum(folder) for folder in (Path(__file__).parent, *code)],
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self._folder = results_folder() / f"{kind.replace(' ', '_')}-{digest[:32]}"

    def files(self) -> dict[str, Path]:
        """The files by their relative paths, verified; empty if the result is not in the cache, or is damaged."""
        return self._find()[0]

    def take(self, folder: Path) -> bool:
        """Copies the files to a folder, and repeats the messages that were logged when the result was made.

        Args:
            folder: The folder; may be missing. Several processes may copy to it at once.

        Returns:
            Whether the result was in the cache. If not, the folder is as it was.

        Raises:
            UserError: The folder cannot be written.
        """
        files, messages = self._find()
        try:
            for name, file in files.items():
                with atomic_write(folder / name) as partial:
                    shutil.copyfile(file, partial)
        except FileNotFoundError:
            # Another process has deleted it to make room.
            for name in files:
                (folder / name).unlink(missing_ok=True)
            return False
        if files:
            logger.info("taking the %s from %s, made before from the same inputs", self._kind, self._folder)
        for name, level, text in messages:
            logging.getLogger(name).log(level, "%s", self._with_path(text))
        return bool(files)

    def keep(self, files: Mapping[str, Path], messages: Sequence[Message] = ()) -> None:
        """Copies the files of a result to the cache, if it has room for them.

        Args:
            files: Files by relative paths.
            messages: Messages that are repeated when the result is taken.
        """
        # A source that was written to since may have been read in either state.
        if not self._is_enabled or self._find()[0] or self._state_of_sources() != self._states:
            return
        stored = [(name, level, self._without_path(text)) for name, level, text in messages]
        try:
            size = sum(file.stat().st_size for file in files.values())
            if not _make_room(self._folder.parent, size):
                logger.info("%.1f GiB of %s are too much for the cache %s", size / 2**30, self._kind, results_folder())
                return
            shutil.rmtree(self._folder, ignore_errors=True)
            with atomic_folder(self._folder) as draft:
                _write_entry(draft, files, stored)
        # The result is there; only the next command has to make it again.
        except (OSError, UserError) as error:
            logger.info("the %s cannot be kept for later commands: %s", self._kind, error)

    def _state_of_sources(self) -> list[tuple[int, int]]:
        return [(status.st_size, status.st_mtime_ns) for status in map(Path.stat, self._sources)]

    def _without_path(self, text: str) -> str:
        """A message with the number of the path with which it begins."""
        for number, path in enumerate(self._paths):
            if text.startswith(path):
                return f"{number}\0{text.removeprefix(path)}"
        return text

    def _with_path(self, text: str) -> str:
        number, separator, rest = text.partition("\0")
        return f"{self._paths[int(number)]}{rest}" if separator else text

    def _find(self) -> tuple[dict[str, Path], list[Message]]:
        if not self._is_enabled:
            return {}, []
        try:
            entry = json.loads((self._folder / _ENTRY).read_text(encoding="utf-8"))
            check_inside(self._folder, entry["files"], self._folder / _ENTRY)
            files = {name: self._folder / name for name in entry["files"]}
            for name, checksum in entry["files"].items():
                verify_file(files[name], checksum, "it is made again")
            messages = [(str(name), int(level), str(text)) for name, level, text in entry["messages"]]
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            # Or of another user, who keeps it private.
            return {}, []
        except (OSError, UserError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("the %s in %s is not used: %s", self._kind, self._folder, error)
            return {}, []
        with suppress(OSError):
            # The time of last use, by which the cache is cleared.
            os.utime(self._folder / _ENTRY)
        return files, messages


@contextmanager
def recorded_messages(name: str) -> Iterator[list[Message]]:
    """Yields a list to which the messages of a logger and of those below it are added, from level INFO.

    Args:
        name: Name of the logger.
    """
    messages: list[Message] = []

    class _Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append((record.name, record.levelno, record.getMessage()))

    recorder = _Recorder(logging.INFO)
    parent = logging.getLogger(name)
    parent.addHandler(recorder)
    try:
        yield messages
    finally:
        parent.removeHandler(recorder)


def files_below(folder: Path) -> dict[str, Path]:
    """All files of a folder by their relative paths.

    Args:
        folder: The folder.
    """
    start = len(folder.parts)
    # Not `relative_to`, whose result is no path of remote storage.
    return {"/".join(path.parts[start:]): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _write_entry(draft: Path, files: Mapping[str, Path], messages: Sequence[Message]) -> None:
    checksums = {}
    for name, file in files.items():
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, draft / name)
        checksums[name] = file_checksum(draft / name)
    entry = {"files": checksums, "messages": messages}
    (draft / _ENTRY).write_text(json.dumps(entry, indent=1), encoding="utf-8")


def _make_room(root: Path, size: int) -> bool:
    """Deletes the results that were used longest ago, and what killed processes have left; whether there is room."""
    limit = limit_bytes()
    # What is in it may be private.
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in root.iterdir():
        remove_stale(path.with_name(path.name.split(".tmp-")[0]))
    if size > _LARGEST_SHARE * min(limit, shutil.disk_usage(root).free):
        return False
    kept = {path.parent: path.stat().st_mtime_ns for path in root.glob(f"*/{_ENTRY}")}
    sizes = {folder: sum(file.stat().st_size for file in files_below(folder).values()) for folder in kept}
    for folder in sorted(kept, key=lambda folder: kept[folder]):
        if sum(sizes.values()) + size <= limit:
            break
        # First, so that the rest is not taken for complete.
        (folder / _ENTRY).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        del sizes[folder]
    return True


@functools.cache
def _code_checksum(folder: Path) -> str:
    """Hash of the source files below a folder, so that results of other code are not used."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
