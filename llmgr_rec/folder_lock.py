"""A lock on an output folder, which the operating system releases when its process ends, however it ends.

On remote storage it is a `RemoteLock`.
"""

import errno
import logging
from pathlib import Path

from filelock import FileLock, Timeout

from llmgr_rec.errors import UserError
from llmgr_rec.files import storage_error
from llmgr_rec.remote_lock import RemoteLock
from llmgr_rec.remote_path import RemotePath

LOCK_NAME = ".lock"
# Errors of storage without locks. All others say that this lock cannot be had.
_WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)

logger = logging.getLogger(__name__)


class FolderLock:
    """Lock on a folder that one process writes to.

    Args:
        folder: The folder.
        task: What a process that has the lock does in the folder, for the error message.
    """

    def __init__(self, folder: Path, task: str) -> None:
        self._folder = folder
        self._task = task
        self._remote = RemoteLock(folder / LOCK_NAME) if isinstance(folder, RemotePath) else None
        if self._remote is not None:
            return
        # Not the library's substitute for storage without locks: a file that a killed process would leave locked.
        self._lock = FileLock(folder / LOCK_NAME, timeout=0, thread_local=False, fallback_to_soft=False)

    def acquire(self) -> None:
        """Locks the folder, which must exist. On storage without locks this only logs a warning.

        Raises:
            UserError: Another process has locked the folder, or the lock file cannot be written: the storage is full or
                read-only, or the file belongs to another user.
        """
        locked = f"another process is {self._task} in {self._folder}; wait until it ends, or give another --output"
        if self._remote is not None:
            if not self._remote.acquire():
                raise UserError(locked)
            return
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(locked) from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                file = self._folder / LOCK_NAME
                raise storage_error(error, file) or UserError(
                    f"{file} cannot be locked ({error.strerror or error}); remove it if no process is {self._task} "
                    "there, or give another --output"
                ) from error
            logger.warning("%s cannot be locked (%s); do not start a second process in it", self._folder, error)

    def join(self) -> None:
        """On a rank other than the one that has locked the folder: keeps to its lock, where storage is remote."""
        if self._remote is not None:
            self._remote.join()

    def release(self) -> None:
        """Deletes the lock file and unlocks the folder; without effect if this process has not locked it."""
        if self._remote is not None:
            self._remote.release()
            return
        if not self._lock.is_locked:
            return
        try:
            # Before unlocking: afterwards it may be the lock of another process.
            (self._folder / LOCK_NAME).unlink(missing_ok=True)
        finally:
            self._lock.release()
