"""`python -m tests.soak --minutes 30`: interrupts every command at random moments until it finishes all the same.

A round runs all commands in a new folder. Each is interrupted some times: SIGKILL, SIGTERM or SIGINT to the command, to
one rank or to all processes, or SIGSTOP for a while; and run again. What it leaves has to be equal, byte for byte, to
what it leaves without interruptions, and no process, lock or temporary file may stay. The same seed draws the same
signals and moments; where a process is at that moment depends on the machine.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.marked_process import MarkedProcess
from tests.soak.folder_contents import contents, differences, leftovers
from tests.soak.soak_steps import STEPS, SoakStep, write_inputs

_ROOT = Path(__file__).parents[2]
# Longest time of a command on a busy machine, and of its end after a signal: the grace period and some more.
_STEP_S, _END_S = 400.0, 45.0
_MAX_INTERRUPTIONS = 5
# Signals with the processes that get them; those to ranks only where there are several.
_ANY = [
    ("SIGKILL", "all"),
    ("SIGKILL", "command"),
    ("SIGTERM", "command"),
    ("SIGINT", "command"),
    ("SIGSTOP", "command"),
]
_RANKS = [
    ("SIGKILL", "rank 1"),
    ("SIGTERM", "rank 0"),
    ("SIGTERM", "rank 1"),
    ("SIGSTOP", "rank 1"),
    ("SIGSTOP", "all"),
]


class SoakError(Exception):
    """Something is not as it should be after an interruption."""


@dataclass
class Reference:
    """An uninterrupted command.

    Args:
        seconds: Time that it took.
        progress: Its progress at the end.
        files: What it left.
    """

    seconds: float
    progress: int
    files: dict[str, bytes]


@dataclass
class Counts:
    """What happened, by step."""

    signals: dict[str, Counter[str]] = field(default_factory=dict)
    finished: Counter[str] = field(default_factory=Counter)
    tracebacks: Counter[str] = field(default_factory=Counter)

    def table(self, steps: list[SoakStep]) -> str:
        """A Markdown table: a row for each step."""
        kinds = sorted({kind for counter in self.signals.values() for kind in counter})
        rows = [["command", *kinds, "finished, equal"], ["---"] * (len(kinds) + 2)]
        for step in steps:
            counter = self.signals.get(step.name, Counter())
            rows.append([step.name, *(str(counter[kind]) for kind in kinds), str(self.finished[step.name])])
        totals = [sum(counter[kind] for counter in self.signals.values()) for kind in kinds]
        rows.append(["all", *map(str, totals), str(sum(self.finished.values()))])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


class Soak:
    """Runs rounds of interrupted commands.

    Args:
        folder: Holds everything.
        steps: Commands, in order.
        seed: Seed of signals and moments.
        minutes: Time after which nothing is interrupted any more.
    """

    def __init__(self, folder: Path, steps: list[SoakStep], seed: int, minutes: float) -> None:
        self._folder = folder
        self._steps = steps
        self._rng = random.Random(seed)
        self._end = time.monotonic() + 60 * minutes
        self._references: dict[str, Reference] = {}
        self.counts = Counts()
        self.rounds = 0

    def run(self) -> None:
        """Runs an uninterrupted round, then interrupted ones until the time is over.

        Raises:
            SoakError: A command does not continue, leaves something, or ends with another result.
        """
        reference = self._folder / "reference"
        self._prepare(reference)
        for step in self._steps:
            start = time.monotonic()
            self._finish(step, reference)
            seconds = time.monotonic() - start
            progress = step.progress(reference) if step.progress else 0
            self._references[step.name] = Reference(seconds, progress, contents(reference, step.output))
            print(f"{step.name}: {seconds:.1f} s without interruption", flush=True)
        self._check_left(reference)
        while time.monotonic() < self._end:
            folder = self._folder / f"round-{self.rounds}"
            self._prepare(folder)
            for step in self._steps:
                self._interrupted(step, folder)
            self._check_left(folder)
            shutil.rmtree(folder)
            self.rounds += 1

    def _prepare(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "tmp").mkdir()
        write_inputs(folder)

    def _start(self, step: SoakStep, folder: Path, log: Path, restarts: int = 0) -> MarkedProcess:
        environment = {"TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(_ROOT)}
        return MarkedProcess(["-W", "ignore", *step.command(restarts)], log, folder, environment)

    def _interrupted(self, step: SoakStep, folder: Path) -> None:
        for number in range(self._rng.randint(1, _MAX_INTERRUPTIONS)):
            # Drawn also where they are not used, so that a seed means the same whatever happens.
            kind, target = self._rng.choice(_ANY + (_RANKS if step.ranks > 1 else []))
            moment, share, pause, restarts = (
                self._rng.random(),
                self._rng.random(),
                self._rng.uniform(0.2, 2),
                self._rng.randint(0, 1),
            )
            if time.monotonic() > self._end or (step.finished and (folder / step.finished).exists()):
                continue
            log = folder.parent / f"{folder.name}-{step.output}-{number}.log"
            process = self._start(step, folder, log, restarts)
            if self._wait_for_moment(process, step, folder, moment, share):
                self.counts.signals.setdefault(step.name, Counter())[f"{kind} {target}"] += 1
                print(f"round {self.rounds}, {step.name}: {kind} to {target} at {moment:.2f}", flush=True)
                self._send(process, kind, target, pause)
            if kind == "SIGSTOP" or restarts:
                self._wait(process)
            if left := process.left_after(_END_S):
                raise SoakError(f"{step.name}: processes {left} ran on after {kind} to {target}; see {log}")
            self._check_code(process, step, kind)
        self._finish(step, folder)
        if different := differences(contents(folder, step.output), self._references[step.name].files):
            raise SoakError(f"{step.name}: {'; '.join(different[:5])}; see {folder}")
        self.counts.finished[step.name] += 1

    def _wait_for_moment(
        self, process: MarkedProcess, step: SoakStep, folder: Path, moment: float, share: float
    ) -> bool:
        """Waits for a share of the time of the command or, where it shows progress, more often of its progress."""
        reference = self._references[step.name]
        start = time.monotonic()
        while process.code() is None:
            if step.progress and share < 0.7:
                if step.progress(folder) >= moment * reference.progress:
                    time.sleep(share)
                    return True
            elif time.monotonic() - start >= moment * reference.seconds:
                return True
            if time.monotonic() - start > _STEP_S:
                return True
            time.sleep(0.005)
        return False

    def _send(self, process: MarkedProcess, kind: str, target: str, pause: float) -> None:
        process.send(signal.Signals[kind], target)
        if kind == "SIGSTOP":
            time.sleep(pause)
            process.send(signal.SIGCONT, target)

    def _wait(self, process: MarkedProcess) -> int:
        try:
            return process.wait(_STEP_S)
        except TimeoutError as error:
            raise SoakError(str(error)) from None

    def _check_code(self, process: MarkedProcess, step: SoakStep, kind: str) -> None:
        """An interrupted command reports no mistake of the user."""
        text = process.log.read_text(errors="replace")
        if process.code() == 2 or (kind == "SIGSTOP" and process.code()):
            raise SoakError(f"{step.name} ended with code {process.code()} after {kind}:\n{text[-2000:]}")

    def _finish(self, step: SoakStep, folder: Path) -> None:
        if step.finished and (folder / step.finished).exists():
            return
        process = self._start(step, folder, folder.parent / f"{folder.name}-{step.output}.log")
        code = self._wait(process)
        if left := process.left_after(_END_S):
            raise SoakError(f"{step.name}: processes {left} outlived it")
        if code:
            text = process.log.read_text(errors="replace")
            raise SoakError(f"{step.name} did not continue, exit code {code}:\n{text[-3000:]}")

    def _check_left(self, folder: Path) -> None:
        if left := leftovers(folder):
            raise SoakError(f"left in {folder}: {', '.join(left[:10])}")


def main(argv: Sequence[str]) -> int:
    """Runs the soak and prints the counts.

    Args:
        argv: Arguments of the command.

    Returns:
        Exit code; if it is not 0, the folder of the soak stays.
    """
    parser = argparse.ArgumentParser("python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="time of the interrupted rounds and of the first one")
    parser.add_argument("--seed", type=int, default=0, help="seed of signals and moments")
    parser.add_argument("--steps", default="", help="names of commands, separated by semicolons; default: all")
    arguments = parser.parse_args(argv)
    names = [name.strip() for name in arguments.steps.split(";") if name.strip()]
    steps = [step for step in STEPS if not names or step.name in names]
    folder = Path(tempfile.mkdtemp(prefix="llmgr-soak-"))
    soak = Soak(folder, steps, arguments.seed, arguments.minutes)
    start = time.monotonic()
    try:
        soak.run()
    except SoakError as error:
        print(soak.counts.table(steps))
        print(
            f"FAILED after {soak.rounds} rounds with seed {arguments.seed}, files in {folder}: {error}", file=sys.stderr
        )
        return 1
    shutil.rmtree(folder)
    print(soak.counts.table(steps))
    print(f"passed: {soak.rounds} rounds, {time.monotonic() - start:.0f} s, seed {arguments.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
