"""What `plan` says of a rank's memory, against the largest resident size that the kernel counts."""

import multiprocessing
import sys
from pathlib import Path

import pytest

from benchmarks.large_dataset import write_dataset
from benchmarks.large_training import measure, planned_mib, train_settings
from benchmarks.phase_peaks import train_measured

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can count the peak of a phase")

# Phase of `plan` in which a measured one falls.
PHASES = {"preflight": "preflight", "checkpoint": "saving", "validation": "selection"}
SESSIONS = 256
SETTINGS = [*train_settings(dim=64, neighbors=[], threads=1), "--sbr.max_steps", "1"]
TIMEOUT_S = 120


def difference_of_peaks(folder: Path, items: list[int]) -> tuple[dict[str, float], dict[str, float]]:
    """Planned and measured difference of the peaks at two sizes, in MiB by measured phase."""
    planned, measured = [], []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks_preload"])
    for size in items:
        dataset = folder / f"items-{size}"
        write_dataset(dataset, size, SESSIONS, features=True)
        words = ["--dataset", str(dataset), "--output", str(folder / f"run-{size}"), *SETTINGS]
        with context.Pool(1) as pool:
            measured.append(pool.apply_async(train_measured, (words,)).get(TIMEOUT_S))
        planned.append(planned_mib(dataset, SETTINGS, ranks=1))
    return (
        {phase: planned[1][place] - planned[0][place] for phase, place in PHASES.items()},
        {phase: measured[1][phase] - measured[0][phase] for phase in PHASES},
    )


def test_memory_grows_with_the_items_as_planned(tmp_path: Path) -> None:
    """A difference, since a process of a test begins with other libraries than a command; to a quarter, or 15 MiB."""
    # Smaller catalogs are ranked with the gates of all items, up to 128 MiB.
    planned, measured = difference_of_peaks(tmp_path, [80_000, 330_000])
    assert measured == pytest.approx(planned, rel=0.25, abs=15)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_planned_peaks_are_those_of_commands(ranks: int, tmp_path: Path) -> None:
    # As in docs/sharding.md: the allocator keeps more over many steps than in a single one.
    settings = train_settings(dim=64, neighbors=[], threads=1)
    # The vectors of the last catalog are not kept by one rank.
    for items in (500_000, 1_000_000, 2_500_000):
        folder = tmp_path / str(items)
        folder.mkdir()
        write_dataset(folder / "dataset", items, 1000, features=True)
        planned = max(planned_mib(folder / "dataset", settings, ranks).values())
        measured = measure(folder / "dataset", folder, settings, ranks)
        assert max(max(peaks.values()) for peaks in measured) == pytest.approx(planned, rel=0.15)
