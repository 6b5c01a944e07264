"""Atomic replacement of files and folders, here and on remote storage, and errors of the storage.

A temporary file or folder is named by the process that writes it, so that a later process can tell whether the writer
still runs, and remove what a killed one left.

What goes to remote storage is written to a temporary file or folder of this machine. A file is then uploaded as a
whole. A folder cannot be renamed there, so its marker, a file that all readers require, is uploaded last.
"""

import errno
import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from llmgr_rec.cache import cache_folder
from llmgr_rec.errors import UserError
from llmgr_rec.paths import path_problem
from llmgr_rec.remote_path import RemotePath

# Process id, hash of machine, and start time of the process; the names of version 0.2 had the process id alone.
_WRITER = r"(?P<pid>\d+)(?:-(?P<machine>[0-9a-f]{8})-(?P<start>\d+))?"
# Temporaries of another machine, whose processes are not visible here, are left alone for this time after a write.
_FOREIGN_AGE_S = 24 * 3600

# Errors of the storage that the user can fix, and how.
_FIXES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EIO: "the device fails; use a folder on another one",
    errno.EROFS: "choose a writable folder",
    errno.EACCES: "choose a folder that you have permission for",
    errno.EFBIG: "its file system has no space for larger files; choose a folder on another one",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.ELOOP: "the links of the path go in a circle; choose another folder",
    errno.ESTALE: "the network storage has changed under it; run the same command again",
}
# Libraries that report the error of a write as text, by its number or by its description.
_ERROR_NUMBER = re.compile(r"\b(?:os error|errno) (\d+)\b", re.IGNORECASE)
_QUOTED_PATH = re.compile(r'"(/[^"]+)"')
# In a folder of remote storage until its marker is there, so that what a killed process left is known as such.
INCOMPLETE = "_INCOMPLETE"
_REPORTED_AS_TEXT = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def require_writable(folder: Path, option: str = "--output") -> None:
    """Checks that a folder is writable, or can be created.

    Args:
        folder: Output folder. It and its parents may be missing.
        option: Command-line option that named the folder, for the error message.

    Raises:
        UserError: The folder, or its nearest existing parent, is a file or is not writable.
    """
    if isinstance(folder, RemotePath):
        if folder.is_file():
            raise UserError(f"{option} {folder} is a file; give the path of a folder")
        folder.check_writable()
        return
    if problem := path_problem(str(folder)):
        raise UserError(f"{option} {folder}: {problem}")
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{option} {folder}: {existing} is a file; give the path of a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{option} {folder}: {existing} is not writable; give another {option}")


def storage_error(error: BaseException, path: Path | None = None) -> UserError | None:
    """The user error of a full disk, an exceeded quota, a failing device or a missing permission.

    Args:
        error: Exception of a write. Its causes and its text are searched too, because libraries wrap the error of the
            operating system.
        path: What was being written; None uses the file that the error names.

    Returns:
        An error with the file and the remedy; None if the exception has another reason.
    """
    cause: BaseException | None = error
    while cause is not None:
        number = _error_number(cause)
        if number is not None:
            quoted = _QUOTED_PATH.search(str(cause))
            file = path or getattr(cause, "filename", None) or (quoted and quoted[1]) or "a file"
            return UserError(f"{file}: {os.strerror(number)}; {_FIXES[number]}")
        cause = cause.__cause__ or cause.__context__
    return None


def _error_number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno in _FIXES:
        return error.errno
    text = str(error)
    numbers = [int(match) for match in _ERROR_NUMBER.findall(text)]
    numbers += [number for number in _REPORTED_AS_TEXT if os.strerror(number) in text]
    return next((number for number in numbers if number in _REPORTED_AS_TEXT), None)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns errors of the storage in the block into user errors that name what was being written.

    Args:
        path: The file or folder.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if known := storage_error(error, path):
            raise known from error
        raise


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yields the path of a temporary file, which replaces `file` if the block succeeds and is deleted if it fails.

    The content is flushed to disk before the file gets its name, so a crash of the machine leaves the old file or the
    new one. Temporary files for the same name that killed processes have left are deleted.

    Args:
        file: File to create or replace. Missing parent folders are created. Several processes may write it at once.

    Raises:
        UserError: The storage is full or cannot be written.
    """
    if isinstance(file, RemotePath):
        with local_draft(file) as folder:
            yield folder / file.name
            file.upload(folder / file.name)
        return
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(file)
        # The suffix stays the same, because some writers choose the format by it.
        partial = file.with_name(f".tmp-{this_writer()}-{file.name}")
        try:
            yield partial
            fsync(partial)
            os.replace(partial, file)
            fsync(file.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, marker: str | None = None) -> Iterator[Path]:
    """Yields a new temporary folder, which becomes `folder` if the block succeeds and is deleted if it fails.

    Its content is flushed to disk before it gets its name. Temporary folders for the same name that killed processes
    have left are deleted.

    Args:
        folder: Folder to create; may exist if it is empty. Missing parent folders are created.
        marker: File in the folder that all readers require; needed where the folder may be remote.

    Raises:
        UserError: The storage is full or cannot be written, or the folder exists and is not empty.
    """
    with local_draft(folder) if isinstance(folder, RemotePath) else _own_folder(folder, "tmp") as partial:
        yield partial
        publish_folder(partial, folder, marker)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder beside `folder`, which is deleted at the end; those of killed processes are deleted too.

    Args:
        folder: Path by which the folder is named.

    Raises:
        UserError: The storage is full or cannot be written.
    """
    with _own_folder(folder, "scratch") as scratch:
        yield scratch


@contextmanager
def local_draft(path: RemotePath) -> Iterator[Path]:
    """Yields a new folder of this machine for what is to be uploaded; it is deleted at the end.

    Args:
        path: Remote file or folder by which it is named.

    Raises:
        UserError: The storage of this machine is full or cannot be written.
    """
    with _own_folder(_drafts_of(path), "tmp") as draft:
        yield draft


def draft_of(path: RemotePath) -> Path:
    """The folder of this machine in which this process writes what it uploads to a path; those of killed ones go.

    Args:
        path: Remote folder.
    """
    drafts = _drafts_of(path)
    remove_stale(drafts)
    return drafts.with_name(f"{drafts.name}.tmp-{this_writer()}")


def _drafts_of(path: RemotePath) -> Path:
    name = hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()
    return cache_folder() / "remote" / "drafts" / name


@contextmanager
def _own_folder(folder: Path, kind: str) -> Iterator[Path]:
    with storage_errors(folder):
        remove_stale(folder)
        own = folder.with_name(f"{folder.name}.{kind}-{this_writer()}")
        try:
            own.mkdir(parents=True)
            yield own
        finally:
            shutil.rmtree(own, ignore_errors=True)


def publish_folder(partial: Path, folder: Path, marker: str | None = None) -> None:
    """Flushes a folder with all its content to disk, then gives it its final name; or uploads it, its marker last.

    Args:
        partial: Complete folder.
        folder: Its final path, absent or an empty folder.
        marker: File in the folder that all readers require; needed where the folder may be remote.

    Raises:
        UserError: The final path exists.
    """
    if isinstance(folder, RemotePath):
        if marker is None:
            raise ValueError(f"{folder} is remote, but has no marker")
        if not is_free(folder, marker):
            raise UserError(f"cannot write {folder} (it is not empty); give a folder that does not exist")
        remove_folder(folder)
        upload_files(partial, folder, marker)
        upload_marker(partial, folder, marker)
        return
    for path in [*partial.rglob("*"), partial]:
        fsync(path)
    try:
        os.replace(partial, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(f"cannot write {folder} ({error.strerror}); give a folder that does not exist") from None
    fsync(folder.parent)


def upload_files(partial: Path, folder: RemotePath, marker: str, leave_out: Collection[str] = ()) -> None:
    """Uploads files to a remote folder, which is incomplete until `upload_marker`.

    Args:
        partial: Folder of this machine.
        folder: Remote folder.
        marker: File that all readers require, which is not uploaded.
        leave_out: Other files of `partial` that are not uploaded.
    """
    if not (folder / INCOMPLETE).exists():
        (folder / INCOMPLETE).write_text(marker)
    for path in sorted(partial.rglob("*")):
        name = str(path.relative_to(partial))
        if path.is_file() and name != marker and name not in leave_out:
            (folder / name).upload(path)


def upload_marker(partial: Path, folder: RemotePath, marker: str) -> None:
    """Uploads the marker of a remote folder, whose other files are there.

    Args:
        partial: Folder of this machine that has the marker.
        folder: Remote folder.
        marker: File that all readers require.
    """
    (folder / marker).upload(partial / marker)
    (folder / INCOMPLETE).unlink(missing_ok=True)


def is_interrupted(folder: Path) -> bool:
    """Whether a folder is remote, and its upload has not come to its marker.

    Args:
        folder: The folder.
    """
    if not isinstance(folder, RemotePath):
        return False
    try:
        marker = (folder / INCOMPLETE).read_text()
    except FileNotFoundError:
        return False
    # A process that was killed after its last file has left the note, which then means nothing.
    return not (folder / marker).is_file()


def is_free(folder: Path, marker: str) -> bool:
    """Whether a folder may become the output of `atomic_folder`: it is absent or empty, or an upload was interrupted.

    Args:
        folder: The folder.
        marker: File that all readers require.
    """
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    if is_interrupted(folder):
        return True
    return not any(folder.iterdir())


def copy_folder(source: Path, target: Path) -> None:
    """Copies the content of a folder, which may be remote, to a folder of this machine.

    Args:
        source: The folder.
        target: Existing folder.
    """
    if not isinstance(source, RemotePath):
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    for file in source.rglob("*"):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file.local(), copy)


def remove_folder(folder: Path, marker: str | None = None) -> None:
    """Deletes a folder with its content.

    Args:
        folder: The folder; may be absent if it is remote.
        marker: File that is deleted first, so that a partly deleted folder does not count as complete.
    """
    if marker is not None:
        (folder / marker).unlink(missing_ok=True)
    if not isinstance(folder, RemotePath):
        shutil.rmtree(folder)
        return
    # Last the mark that says what the others are.
    for path in sorted(folder.rglob("*"), key=lambda path: path == folder / INCOMPLETE):
        path.unlink(missing_ok=True)


def remove_stale(path: Path) -> None:
    """Deletes temporary files and folders for a path whose writers do not run any more.

    Temporaries of other machines are deleted a day after the last change in them.

    Args:
        path: The file or folder that the temporaries were to become, or were named by.
    """
    if isinstance(path, RemotePath):
        return
    own = re.escape(path.name)
    patterns = [re.compile(rf"\.tmp-{_WRITER}-{own}"), re.compile(rf"{own}\.(?:tmp|scratch)-{_WRITER}")]
    if not path.parent.is_dir():
        return
    # A folder of scores has thousands of files.
    for name in os.listdir(path.parent):
        match = next(filter(None, (pattern.fullmatch(name) for pattern in patterns)), None)
        other = path.parent / name
        if match is None or not _is_stale(other, int(match["pid"]), match["machine"], match["start"]):
            continue
        if other.is_dir():
            shutil.rmtree(other, ignore_errors=True)
        else:
            other.unlink(missing_ok=True)


def _is_stale(path: Path, pid: int, machine: str | None, start: str | None) -> bool:
    if machine not in (None, _this_machine()):
        return time.time() - _last_change(path) > _FOREIGN_AGE_S
    running = _start_time(pid)
    # The same process id with another start time is another process.
    return running is None or (start is not None and running != int(start))


def is_running(writer: str) -> bool | None:
    """Whether a process runs; None if it is of another machine.

    Args:
        writer: Its name, from `this_writer`.
    """
    match = re.fullmatch(_WRITER, writer)
    if match is None or match["machine"] != _this_machine():
        return None
    running = _start_time(int(match["pid"]))
    return running is not None and running == int(match["start"])


def _last_change(path: Path) -> float:
    newest = 0.0
    for entry in [path, *(path.rglob("*") if path.is_dir() else ())]:
        try:
            newest = max(newest, entry.lstat().st_mtime)
        except FileNotFoundError:
            # Its writer is at work.
            return time.time()
    return newest


def this_writer() -> str:
    """Name of this process: its id, a hash of the machine, and when it started."""
    pid = os.getpid()
    return f"{pid}-{_this_machine()}-{_start_time(pid) or 0}"


@cache
def _this_machine() -> str:
    """Hash of what a process id is unique in: the running system and, in it, the container."""
    known = [socket.gethostname()]
    try:
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        known.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        pass
    return hashlib.blake2b("\0".join(known).encode(), digest_size=4).hexdigest()


def _start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None if it does not run, 0 if that is not known."""
    try:
        # The name of the program, in parentheses, may contain anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except OSError:
        return None if Path("/proc/self/stat").exists() else 0


def fsync(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to disk.

    Args:
        path: File or folder.
    """
    if isinstance(path, RemotePath):
        return
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
