"""Memory of training by number of items, phase and rank, beside the estimate of `plan`. Linux only.

```sh
python -m benchmarks.large_training --items [2000000] --ranks 2
python -m benchmarks.large_training --items [20000000] --ranks 2
```

Sessions are random, and items have categories, brands and words, but no titles. A rank takes a few steps, a checkpoint,
a validation, the selection of blend weights where there are neighbors, and the export. The second line needs about 22
GB of disk and 10 GB of memory.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.commands import run_module
from benchmarks.harness import benchmark_parser, write_report
from llmgr_rec.bounds import Bounds, check_options
from llmgr_rec.cli import parse_args, run_cli

_MIB = 1 << 20
_STEPS = 20


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and measures."""
    parser = benchmark_parser("large_training", "Measures the memory of training by phase and rank.")
    parser.add_argument("--items", type=list[int], default=[1_000_000, 2_000_000], help="Sizes of the catalog.")
    parser.add_argument("--ranks", type=int, default=1, help="Processes on this machine.")
    parser.add_argument("--sessions", type=int, default=1000, help="Sessions of each split.")
    parser.add_argument("--dim", type=int, default=64, help="Columns of the tables.")
    parser.add_argument("--neighbors", type=list[str], default=[], help="As blend.neighbors.")
    args = parse_args(parser, argv).as_dict()
    check_options(
        {name: args[name] for name in ("ranks", "sessions")},
        {"ranks": Bounds(at_least=1, at_most=64), "sessions": Bounds(at_least=256, at_most=100_000_000)},
    )
    for items in args["items"]:
        check_options({"items": items}, {"items": Bounds(at_least=10_000, at_most=1_000_000_000)})
    from benchmarks.large_dataset import write_dataset

    results: dict[str, Any] = {}
    for items in args["items"]:
        with tempfile.TemporaryDirectory(prefix="llmgr-large-training-") as folder:
            dataset = Path(folder) / "dataset"
            write_dataset(dataset, items, args["sessions"], features=True)
            settings = train_settings(args["dim"], args["neighbors"], args["threads"] or 1)
            peaks = measure(dataset, Path(folder), settings, args["ranks"])
            planned = planned_mib(dataset, settings, args["ranks"])
        results[str(items)] = {"planned": planned, "peaks": peaks}
        _print_rows(items, planned, peaks)
    write_report(args["output"], args, results)


def train_settings(dim: int, neighbors: Sequence[str], threads: int) -> list[str]:
    """Settings of a short training, as arguments.

    Args:
        dim: Columns of the tables.
        neighbors: As `blend.neighbors`.
        threads: Threads of a rank.
    """
    options = {
        "tables.dim": dim,
        "tables.optimizer": "rowwise_adagrad",
        "tables.knn_smoothing": "[0.0]",
        "optimizer.average": 0,
        "blend.neighbors": f"[{','.join(neighbors)}]",
        "sbr.epochs": 2,
        "sbr.max_steps": _STEPS,
        "runtime.threads_per_rank": threads,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def measure(dataset: Path, folder: Path, settings: Sequence[str], ranks: int) -> list[dict[str, float]]:
    """Trains, and returns the peak memory of each rank by phase, in MiB.

    Args:
        dataset: The data set.
        folder: Folder for the run and the results.
        settings: Arguments of `llmgr_rec.train`.
        ranks: Processes.
    """
    peaks = folder / "peaks"
    peaks.mkdir()
    words = [str(peaks), "--dataset", str(dataset), "--output", str(folder / "run"), *settings]
    run_module("benchmarks.phase_peaks", words, ranks)
    return [json.loads((peaks / f"{rank}.json").read_text()) for rank in range(ranks)]


def planned_mib(dataset: Path, settings: Sequence[str], ranks: int) -> dict[str, float]:
    """What `plan` says of the rank that needs most, in MiB, by phase.

    Args:
        dataset: The data set.
        settings: Arguments of `llmgr_rec.train`.
        ranks: Ranks of the run.
    """
    from llmgr_rec.data.dataset import Dataset
    from llmgr_rec.train import parse_arguments
    from llmgr_rec.training.memory_plan import CatalogSizes, Ranks, plan_memory
    from llmgr_rec.training.rank_memory import Reading, estimate_memory

    _, config = parse_arguments(settings)
    prepared = Dataset(dataset)
    sizes, on_ranks = CatalogSizes.of(prepared), Ranks(ranks, ranks, "cpu")
    (plan,) = plan_memory(config, sizes, on_ranks)
    memory = estimate_memory(plan, sizes, on_ranks, Reading.of(prepared.manifest))
    return {name: size / _MIB for name, size in memory.phases.items()}


def _print_rows(items: int, planned: dict[str, float], peaks: Sequence[dict[str, float]]) -> None:
    print(f"{items:,} items, MiB\n{'phase':<16}" + "".join(f"{f'rank {rank}':>10}" for rank in range(len(peaks))))
    for phase in peaks[0]:
        print(f"{phase:<16}" + "".join(f"{rank[phase]:>10,.0f}" for rank in peaks))
    print(f"{'largest':<16}" + "".join(f"{max(rank.values()):>10,.0f}" for rank in peaks))
    print(f"{'plan':<16}{max(planned.values()):>10,.0f}", flush=True)


if __name__ == "__main__":
    run_cli(main)
