"""A lock on a folder of remote storage, which has no locks: an object that its process renews while it runs.

A process of this machine that has ended leaves its lock to the next at once. Whether one of another machine still runs
shows in whether it renews its lock, so clocks are not compared. A process whose lock was taken in the meantime, since
it was suspended or cut off, ends before its next change of the folder.
"""

import json
import logging
import threading
import time

from llmgr_rec.errors import UserError
from llmgr_rec.files import is_running, this_writer
from llmgr_rec.remote_path import RemotePath

# Seconds between two renewals, and without one until the lock of another machine is free.
RENEW_S = 15.0
EXPIRE_S = 60.0
# Seconds until two processes that take over the same lock have both written it.
_TAKE_OVER_S = 1.0

logger = logging.getLogger(__name__)


class RemoteLock:
    """Lock on a folder that one process at a time has; it is renewed in a thread.

    Args:
        file: The object, in the folder.
    """

    def __init__(self, file: RemotePath) -> None:
        self._file = file
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._renewals = 0
        # The process that has the lock, which is another one than this on all ranks but one.
        self._holder: str | None = None
        # Not every storage replaces an object at once, so this process does not read what it is writing.
        self._access = threading.RLock()

    def acquire(self) -> bool:
        """Takes the lock, after a wait if a process of another machine has it and does not renew it.

        From then on, each change of the folder by this process requires that it still has the lock.

        Returns:
            False if another process has the lock.

        Raises:
            UserError: The storage cannot be used.
        """
        if not self._file.create(self._content()) and not self._take_over():
            return False
        self._stop.clear()
        self._thread = threading.Thread(target=self._renew, name="remote-lock", daemon=True)
        self._require(this_writer())
        self._thread.start()
        return True

    def join(self) -> None:
        """Lets this process change the folder while the process that has the lock now, another rank, still has it."""
        if self._holder is None and (holder := self._owner()):
            self._require(holder)

    def release(self) -> None:
        """Deletes the object if this process has the lock, and ends the requirement."""
        if self._holder is None:
            return
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        self._holder = None
        self._folder.require_lock(None)
        if self._owner() == this_writer():
            self._file.unlink(missing_ok=True)

    @property
    def _folder(self) -> RemotePath:
        return self._file.parent

    def _require(self, holder: str) -> None:
        self._holder = holder
        self._folder.require_lock(self._check)

    def _check(self) -> None:
        with self._access:
            if self._owner() != self._holder:
                raise UserError(
                    f"{self._file} was removed, or taken by another process while this one was suspended or cut off; "
                    "this one ends without writing there; run the same command again when no other one runs"
                )

    def _take_over(self) -> bool:
        owner = self._owner()
        running = owner is not None and is_running(owner)
        if running or (running is None and not self._expires()):
            return False
        self._file.write_bytes(self._content())
        time.sleep(_TAKE_OVER_S)
        return self._owner() == this_writer()

    def _expires(self) -> bool:
        """Whether the lock of a process of another machine is not renewed for `EXPIRE_S`."""
        logger.warning("%s is locked by another machine; waiting up to %.0f s for its renewal", self._file, EXPIRE_S)
        before, end = self._read(), time.monotonic() + EXPIRE_S
        while time.monotonic() < end:
            time.sleep(min(RENEW_S, EXPIRE_S) / 5)
            if self._read() != before:
                return False
        return True

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                with self._access:
                    if self._owner() != self._holder:
                        # The next change of the folder ends the process.
                        return
                    self._renewals += 1
                    self._file.write_bytes(self._content())
            except UserError as error:
                # A later renewal may succeed.
                logger.warning("the lock is not renewed: %s", error)

    def _content(self) -> bytes:
        return json.dumps({"writer": this_writer(), "renewals": self._renewals}).encode()

    def _read(self) -> bytes | None:
        try:
            return self._file.read_bytes()
        except FileNotFoundError:
            return None

    def _owner(self) -> str | None:
        """The process that has the lock; None if none has, or the object has another content."""
        try:
            content = json.loads(self._read() or b"{}")
        except ValueError:
            return None
        writer = content.get("writer") if isinstance(content, dict) else None
        return writer if isinstance(writer, str) else None
