"""Processor time and memory of `score` and `evaluate` by number of items.

```sh
python -m benchmarks.large_catalogs
python -m benchmarks.large_catalogs --items [10000000]
```

The recommender is untrained, the sessions are random, and items have ids alone, so that a catalog of ten million items
takes minutes and not hours to make. Each row is printed when it is measured.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.commands import run_module
from benchmarks.harness import benchmark_parser, write_report
from llmgr_rec.bounds import Bounds, check_options
from llmgr_rec.cli import parse_args, run_cli

_DIM = 64


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and measures."""
    parser = benchmark_parser("large_catalogs", "Measures score and evaluate by number of items.")
    parser.add_argument("--items", type=list[int], default=[10_000, 100_000, 1_000_000], help="Sizes of the catalog.")
    parser.add_argument("--sessions", type=int, default=2000, help="Sessions.")
    args = parse_args(parser, argv).as_dict()
    check_options({"sessions": args["sessions"]}, {"sessions": Bounds(at_least=1, at_most=10_000_000)})
    for items in args["items"]:
        check_options({"items": items}, {"items": Bounds(at_least=32, at_most=100_000_000)})
    results: dict[str, Any] = {}
    print(f"{'items':>12}{'command':>12}{'processor s':>14}{'MiB':>10}")
    for items in args["items"]:
        with tempfile.TemporaryDirectory(prefix="llmgr-large-catalogs-") as folder:
            dataset, run = make_run(Path(folder), items, args["sessions"])
            costs = {
                name: run_module(f"llmgr_rec.{name}", words) for name, words in _commands(dataset, run, args["threads"])
            }
        results[str(items)] = {name: asdict(cost) for name, cost in costs.items()}
        for name, cost in costs.items():
            print(f"{items:>12,}{name:>12}{cost.processor_s:>14.1f}{cost.process_mib:>10,.0f}", flush=True)
    write_report(args["output"], args, results)


def _commands(dataset: Path, run: Path, threads: int) -> list[tuple[str, list[str]]]:
    common = ["--run_folder", str(run), *(["--threads", str(threads)] if threads else [])]
    metrics, scores = str(run.parent / "metrics.json"), str(run.parent / "scores")
    return [
        ("score", [*common, "--input", str(dataset / "test"), "--output", scores]),
        ("evaluate", [*common, "--dataset", str(dataset), "--output", metrics, "--models", "popularity,sbr"]),
    ]


def make_run(folder: Path, items: int, sessions: int) -> tuple[Path, Path]:
    """Writes a data set of random sessions and a run with an untrained session recommender.

    Args:
        folder: Empty folder.
        items: Items of the catalog.
        sessions: Sessions of each split.

    Returns:
        Folders of the data set and of the run.
    """
    import torch

    from benchmarks.large_dataset import write_dataset
    from llmgr_rec.config import Config
    from llmgr_rec.config_file import save_config
    from llmgr_rec.data.catalog import Catalog
    from llmgr_rec.data.dataset import Dataset
    from llmgr_rec.distributed.process_group import World
    from llmgr_rec.storage.bundle_export import export_bundle
    from llmgr_rec.storage.model_factory import ModelFactory
    from llmgr_rec.storage.table_io import init_tables

    dataset, run, cpu = folder / "dataset", folder / "run", torch.device("cpu")
    write_dataset(dataset, items, sessions)
    config = Config()
    config.tables.dim, config.tables.knn_smoothing, config.blend.neighbors = _DIM, [0.0], []
    catalog, factory = Catalog.load(dataset), ModelFactory()
    model = factory.build(factory.spec("sbr", config, catalog), None, cpu)
    init_tables(model, config.seed, 0.1)
    run.mkdir()
    save_config(config, run / "config.yaml")
    export_bundle(model, "sbr", config, catalog, run / "export" / "sbr", World.alone(), Dataset(dataset).manifest)
    return dataset, run


if __name__ == "__main__":
    run_cli(main)
