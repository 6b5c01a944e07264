"""A lock on a folder of remote storage, which has no locks: an object that its process renews while it runs.

A process of this machine that has ended leaves its lock to the next at once. Whether one of another machine still runs
shows in whether it renews its lock, so clocks are not compared.
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
    """Lock that one process at a time has.

    Args:
        file: The object.
    """

    def __init__(self, file: RemotePath) -> None:
        self._file = file
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._renewals = 0

    @property
    def is_locked(self) -> bool:
        """Whether this object has the lock."""
        return self._thread is not None

    def acquire(self) -> bool:
        """Takes the lock, after a wait if a process of another machine has it and does not renew it.

        Returns:
            False if another process has the lock.

        Raises:
            UserError: The storage cannot be used.
        """
        if not self._file.create(self._content()) and not self._take_over():
            return False
        self._stop.clear()
        self._thread = threading.Thread(target=self._renew, name="remote-lock", daemon=True)
        self._thread.start()
        return True

    def release(self) -> None:
        """Deletes the object; without effect if this object does not have the lock."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        if self._owner() == this_writer():
            self._file.unlink(missing_ok=True)

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
                if self._owner() not in (None, this_writer()):
                    logger.error("%s was taken by another process; end one of the two", self._file)
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
