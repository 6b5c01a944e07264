"""Names a rank that hangs or has ended, and ends the ranks that wait for it.

A thread of every rank writes to the store once a second where its main thread is, and reads what the next rank wrote.
A stopped, frozen or lost process no longer writes, and its predecessor notices. A rank that still writes but does not
come to a collective is found by the timeout of that collective. So each rank reads and writes two keys per second, at
any number of ranks.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from llmgr_rec.errors import RankLostError

_KEY = "llmgr_rec/rank/{}"
_INTERVAL_S = 1.0
# Longest wait for the threads of the watch when this rank ends.
_JOIN_S = 5.0
# Ranks that an error message describes at most.
_MAX_NAMED = 4
_OUTSIDE = "outside of collectives"
# Text of the errors by which gloo, NCCL and the store report a lost connection or a timeout.
_TIMEOUT = ("Timed out", "timed out", "Application timeout", "Watchdog caught collective operation timeout")
_LOST = (*_TIMEOUT, "gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL", "TCPStore")
_PACKAGE = Path(__file__).parents[1]
_COLLECTIVES = str(Path(__file__).with_name("collectives.py"))
# Files of the package whose functions only wrap a collective.
_WRAPPERS = ("/collectives.py", "/process_group.py", "/rank_watch.py")


@dataclass(frozen=True)
class Beat:
    """What a rank writes to the store.

    Args:
        count: Number of times that it has written.
        host: Machine and boot of the process.
        pid: Process id.
        where: Progress, collective and function of the main thread.
        ended: Whether the rank has left the process group.
    """

    count: int
    host: str
    pid: int
    where: str
    ended: bool = False

    @property
    def in_collective(self) -> bool:
        """Whether the main thread waits in a collective."""
        return _OUTSIDE not in self.where


class RankWatch:
    """Writes the beats of this rank and checks those of the next one.

    Args:
        store: Store of the process group; the watch opens a connection of its own.
        rank: This rank.
        size: Number of ranks.
        silence_s: Seconds without a beat after which a rank is given up.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, silence_s: float) -> None:
        self._store = store.clone()  # type: ignore[attr-defined]
        self._rank = rank
        self._size = size
        self._silence_s = silence_s
        self._main = threading.main_thread().ident
        self._host = _host()
        self._watched = (rank + 1) % size
        self._count = 0
        self._progress = "start-up"
        self._beats: dict[int, Beat] = {}
        self._exchanges = 0
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=target, name="rank watch", daemon=True) for target in (self._exchange, self._judge)
        ]

    def announce(self) -> None:
        """Writes the first beat; to be called before the process group is made, which all ranks wait for."""
        self._write()

    def start(self) -> None:
        """Starts the threads, when all ranks have announced themselves."""
        self._beats = {rank: self._read(rank) for rank in (0, self._watched)}
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stops the threads, and tells the other ranks that this one has ended as it should."""
        self._ended.set()
        for thread in self._threads:
            thread.join(_JOIN_S)
        if not any(thread.is_alive() for thread in self._threads):
            try:
                self._write(ended=True)
            except RuntimeError:
                # Rank 0 has ended already, and its store with it.
                return

    def progress(self, text: str) -> None:
        """Sets what this rank says of its progress, such as `stage sbr, step 12`."""
        self._progress = text

    def explain(self, error: BaseException) -> RankLostError | None:
        """Names the ranks that made a collective fail.

        If the collective has timed out, hung ranks on this machine are killed, because a launcher would first wait for
        them.

        Args:
            error: Exception of a collective.

        Returns:
            The error with the names; None if the exception has another reason.
        """
        if not any(text in str(error) for text in _LOST):
            return None
        timed_out = any(text in str(error) for text in _TIMEOUT)
        here = f"{self._progress}, {describe(_raised_in(error))}"
        try:
            first = self._read_all()
            time.sleep(2.5 * _INTERVAL_S)
            second = self._read_all()
        except RuntimeError:
            return RankLostError(f"rank 0, which keeps the store of the ranks, has ended; {_advice(self._rank, here)}")
        silent = {rank: beat for rank, beat in second.items() if beat == first.get(rank)}
        stuck = {rank: beat for rank, beat in second.items() if not beat.in_collective} if timed_out else {}
        named = silent or stuck or second
        if timed_out:
            for beat in (silent or stuck).values():
                self._kill(beat)
        verb = "has ended or hangs" if silent else "did not come"
        ranks = "; ".join(
            f"rank {rank} (pid {beat.pid}) {verb}, last at {beat.where}"
            for rank, beat in list(named.items())[:_MAX_NAMED]
        )
        return RankLostError(f"{ranks}; {_advice(self._rank, here)}")

    def _exchange(self) -> None:
        """Writes and reads beats. The store of a stopped process answers neither with a value nor with an error."""
        while not self._ended.wait(_INTERVAL_S):
            try:
                self._write()
                self._beats[self._watched] = self._read(self._watched)
            except RuntimeError:
                continue
            self._exchanges += 1

    def _judge(self) -> None:
        """Measures how long the store and the next rank have been silent."""
        silent_s = {0: 0.0, self._watched: 0.0}
        seen: dict[int, object] = {}
        before = time.monotonic()
        while not self._ended.wait(_INTERVAL_S):
            now = time.monotonic()
            # If this process was stopped itself, the others were not silent for longer than that.
            elapsed, before = min(now - before, 5 * _INTERVAL_S), now
            signs: dict[int, object] = {self._watched: self._beats[self._watched]}
            if self._rank:
                signs[0] = (self._exchanges, signs.get(0))
            for rank, sign in sorted(signs.items()):
                silent_s[rank] = 0.0 if sign != seen.get(rank) else silent_s[rank] + elapsed
                if silent_s[rank] >= self._silence_s and not self._beats[rank].ended:
                    self._give_up(rank, silent_s[rank])
            seen = signs

    def _give_up(self, rank: int, silent_s: float) -> None:
        """Ends a silent rank, if it is on this machine, and then this one; the launcher ends the others."""
        beat = self._beats[rank]
        error = f"rank {rank} (pid {beat.pid}) gave no sign of life for {silent_s:.0f} s, last at {beat.where}"
        sys.stderr.write(f"error: {error}; {_advice(self._rank, self._where())}\n")
        sys.stderr.flush()
        self._kill(beat)
        os._exit(1)

    def _kill(self, beat: Beat) -> None:
        if beat.host == self._host and beat.pid != os.getpid():
            try:
                os.kill(beat.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                return

    def _write(self, ended: bool = False) -> None:
        with self._lock:
            self._count += 1
            beat = Beat(self._count, self._host, os.getpid(), self._where(), ended)
            self._store.set(_KEY.format(self._rank), json.dumps(asdict(beat)))

    def _read(self, rank: int) -> Beat:
        with self._lock:
            return Beat(**json.loads(self._store.get(_KEY.format(rank))))

    def _read_all(self) -> dict[int, Beat]:
        beats = {rank: self._read(rank) for rank in range(self._size) if rank != self._rank}
        return {rank: beat for rank, beat in beats.items() if not beat.ended}

    def _where(self) -> str:
        frame = sys._current_frames().get(self._main or 0)
        return f"{self._progress}, {describe(frame)}"


def describe(frame: FrameType | None) -> str:
    """The collective that a thread waits in, and the function of this package that called it.

    Args:
        frame: Innermost frame of the thread.
    """
    collective, function = _OUTSIDE, ""
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.endswith("/distributed_c10d.py"):
            # The outermost one is the collective that was called; it may be made of others.
            collective = name
        elif file.endswith("/autograd/graph.py") and name == "_engine_run_backward":
            collective = "backward pass"
        elif name == "_wait_impl" and "/torchrec/distributed/" in file and collective == _OUTSIDE:
            collective = type(frame.f_locals.get("self")).__name__
        elif collective == _OUTSIDE and ("/torch/distributed/fsdp/" in file or file == _COLLECTIVES):
            collective = name
        if _PACKAGE.as_posix() in file and not file.endswith(_WRAPPERS) and not function:
            function = f" of {name} ({Path(file).relative_to(_PACKAGE.parent)}:{frame.f_lineno})"
        frame = frame.f_back
    return f"{collective}{function}"


def _raised_in(error: BaseException) -> FrameType | None:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame if trace else None


def _advice(rank: int, where: str) -> str:
    return f"rank {rank} waited for it at {where} and ends; --resume continues from the newest checkpoint"


def _host() -> str:
    """This machine since its last boot; containers on it that do not see each other's processes differ."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    parts = [boot.read_text().strip() if boot.is_file() else "", os.readlink(namespace) if namespace.exists() else ""]
    return " ".join([socket.gethostname(), *parts])
