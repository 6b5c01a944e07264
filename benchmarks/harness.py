"""Shared by all benchmarks: measuring in turns, ratios with their spread, and the JSON file of results.

The speed of a shared machine changes from minute to minute. Both sides of a comparison therefore take turns in short
slices, and each round gives one ratio: what slows a round down slows both of its sides.
"""

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmgr_rec.cli import make_parser, progress
from llmgr_rec.files import atomic_write
from llmgr_rec.paths import LocalPath

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

PACKAGES = ("torch", "torchrec", "transformers", "peft", "numpy", "pyarrow")


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Args:
        name: Name in the results.
        work: Does a slice of work and returns its number of units.
    """

    name: str
    work: Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it.

    Args:
        median: Middle value over the rounds.
        low: First quartile.
        high: Third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Median and quartiles of some values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:,.4g} [{self.low:,.4g} .. {self.high:,.4g}]"


def take_turns(
    sides: Sequence[Side], rounds: int, warm_up: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Measures each side once in every round.

    Args:
        sides: The sides; their order alternates between rounds.
        rounds: Rounds that are measured.
        warm_up: Rounds before them that are not.
        clock: Seconds so far; `time.process_time` counts CPU seconds.

    Returns:
        Units per second of each side, one value per round.
    """
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    bar = progress(warm_up + rounds, "benchmark", "round")
    for number in range(warm_up + rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            started = clock()
            units = side.work()
            elapsed = clock() - started
            if number >= warm_up:
                rates[side.name].append(units / elapsed)
        bar.update()
    bar.close()
    return rates


def ratio(rates: Mapping[str, Sequence[float]], fast: str, slow: str) -> Spread:
    """Ratio of the rates of two sides, round by round."""
    return Spread.of([mine / other for mine, other in zip(rates[fast], rates[slow], strict=True)])


def rate_table(rates: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Median and quartiles of the rates of each side, for the JSON file."""
    return {name: asdict(Spread.of(values)) for name, values in rates.items()}


def peak_memory_mib() -> float:
    """Largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def benchmark_parser(name: str, description: str, example: str = "") -> "ArgumentParser":
    """A parser with the arguments that all benchmarks have.

    Args:
        name: Module name in this package.
        description: What is compared, one sentence.
        example: Arguments of an example, where some are required.
    """
    parser = make_parser(f"benchmarks.{name}", description, example)
    parser.add_argument(
        "--output", type=LocalPath, default=f"runs/benchmarks/{name}.json", help="JSON file of the results."
    )
    parser.add_argument("--rounds", type=int, default=5, help="Rounds that are measured.")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes all cores.")
    return parser


def set_threads(threads: int) -> int:
    """Sets torch's threads; 0 takes all cores that this process may use. Returns their number."""
    import torch

    count = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    return count


def write_report(path: str, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Writes settings, machine and results as a JSON file and prints its path."""
    from llmgr_rec.storage.machine import processor_name

    report = {
        "settings": dict(settings),
        "machine": {
            "processor": processor_name(),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "results": dict(results),
    }
    with atomic_write(Path(path)) as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {path}")
