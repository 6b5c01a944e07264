"""Trains as `llmgr_rec.train` does, and writes the peak memory of this process in each phase to a file.

Linux only: the kernel counts the largest resident size, and forgets it when it is told to.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmgr_rec.process_facts import rank

_MIB = 1 << 20
# Tells the kernel to count the largest resident size anew, from proc(5).
_FORGET_PEAK = "5"


class PhasePeaks:
    """Peak memory of phases, in MiB. A phase inside of another one does not count for the outer one.

    Attributes:
        mib: Largest peak of each phase, by name, in the order of their ends.
    """

    def __init__(self) -> None:
        self.mib: dict[str, float] = {}
        self._open = ["between"]
        _forget_peak()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures a block.

        Args:
            name: Name of the phase.
        """
        self._note()
        self._open.append(name)
        try:
            yield
        finally:
            self._note()
            self._open.pop()

    def measured(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that is measured as a phase whenever it is called.

        Args:
            name: Name of the phase.
            function: The function or method.
        """

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            with self.phase(name):
                return function(*args, **options)

        return call

    def _note(self) -> None:
        current = self._open[-1]
        self.mib[current] = max(self.mib.get(current, 0.0), peak_mib())
        _forget_peak()


def peak_mib() -> float:
    """Largest resident size of this process since the kernel was told to forget it, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text(_FORGET_PEAK)


def train_measured(arguments: Sequence[str]) -> dict[str, float]:
    """Trains, and returns the peak memory of this process in each phase, in MiB.

    Args:
        arguments: Arguments of `llmgr_rec.train`.
    """
    from llmgr_rec.storage.checkpoint import CheckpointManager
    from llmgr_rec.train import main
    from llmgr_rec.training import selection, stages, train_run
    from llmgr_rec.training.loop import StageLoop

    peaks = PhasePeaks()
    places: list[tuple[Any, str, str]] = [
        (train_run, "check_run", "preflight"),
        (stages, "_build", "tables"),
        (StageLoop, "run", "steps"),
        (stages, "evaluate_model", "validation"),
        (CheckpointManager, "save", "checkpoint"),
        (CheckpointManager, "load", "loading of the best"),
        (stages, "select_on_validation", "selection"),
        (selection, "with_trees", "re-ranker"),
        (stages, "export_bundle", "export"),
    ]
    replaced = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for (owner, name, phase), (_, _, function) in zip(places, replaced, strict=True):
        setattr(owner, name, peaks.measured(phase, function))
    try:
        with peaks.phase("start and end"):
            main(arguments)
    finally:
        for owner, name, function in replaced:
            setattr(owner, name, function)
    return peaks.mib


def main(argv: Sequence[str]) -> None:
    """Trains, and writes the peaks of this rank to FOLDER/RANK.json; the arguments are FOLDER and those of `train`."""
    folder, *arguments = argv
    peaks = train_measured(arguments)
    (Path(folder) / f"{rank()}.json").write_text(json.dumps(peaks))


if __name__ == "__main__":
    from llmgr_rec.cli import run_cli

    assert sys.platform == "linux"
    run_cli(main)
