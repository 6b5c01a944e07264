"""Embedding tables in fewer bits: their size, the time of a lookup, and NDCG@20 against float32.

```sh
python -m benchmarks.table_dtypes --run RUN --dataset DATASET --threads 1
```
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from benchmarks.harness import Side, Spread, benchmark_parser, set_threads, take_turns, write_report
from llmgr_rec.cli import add_run_argument, parse_args, run_cli
from llmgr_rec.config import TableDType
from llmgr_rec.paths import LocalPath

if TYPE_CHECKING:
    from llmgr_rec.evaluation.rank_collector import TargetRanks
    from llmgr_rec.storage.bundle import Bundle

_MIB = 2**20


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and measures."""
    parser = benchmark_parser("table_dtypes", "Measures embedding tables in fewer bits.", "--run run --dataset data")
    add_run_argument(parser)
    parser.add_argument("--dataset", type=LocalPath, required=True, help="Data set of the run.")
    parser.add_argument("--split", type=str, default="test", help="Split to rank: test or valid.")
    args = parse_args(parser, argv).as_dict()
    set_threads(args["threads"])

    from llmgr_rec.evaluation.intervals import count_pairs, paired_gains
    from llmgr_rec.storage.bundle import load_bundle

    dtypes: tuple[TableDType, ...] = get_args(TableDType)
    loaded = {dtype: load_bundle(args["run"], table_dtype=dtype) for dtype in dtypes}
    rates = take_turns([_lookup(dtype, bundle) for dtype, bundle in loaded.items()], args["rounds"], clock=_clock)
    results: dict[str, Any] = {}
    ranks: dict[str, TargetRanks] = {}
    print(f"{'tables':<10}{'MiB':>8}{'of a bundle':>13}  CPU ms, all items    NDCG@20  relative to float32")
    for dtype, bundle in loaded.items():
        ndcg, ranks[dtype] = _ranks(bundle, Path(args["dataset"]), args["split"])
        gain = paired_gains(count_pairs(ranks[dtype], ranks["float32"]))["ndcg@20"]
        times = Spread.of([1000 / rate for rate in rates[dtype]])
        tables, whole = _sizes(bundle.path, dtype)
        results[dtype] = {"tables_mib": tables, "bundle_mib": whole, "lookup_ms": asdict(times), "ndcg@20": ndcg}
        line = f"{dtype:<10}{tables:>8.2f}{whole:>13.2f}  {times!s:<20}{ndcg:>8.4f}"
        if gain is not None:
            results[dtype]["gain"] = asdict(gain)
            line += f"  {gain.mean:+.2%} [{gain.low:+.2%} .. {gain.high:+.2%}]"
        print(line, flush=True)
    write_report(args["output"], args, results)


def _clock() -> float:
    return time.process_time()


def _lookup(dtype: str, bundle: "Bundle") -> Side:
    """The vectors of all items, of which each is a bag of rows of all tables."""
    import torch

    features = bundle.collate.item_features(torch.arange(bundle.catalog.num_items))

    def work() -> float:
        with torch.no_grad():
            bundle.model.item_vectors(features)
        return 1.0

    return Side(dtype, work)


def _ranks(bundle: "Bundle", dataset: Path, split: str) -> tuple[float, "TargetRanks"]:
    from llmgr_rec.data.dataset import Dataset
    from llmgr_rec.distributed.process_group import World
    from llmgr_rec.evaluation.exclusion import ranking_rule
    from llmgr_rec.evaluation.protocol import Measures, evaluate_model
    from llmgr_rec.evaluation.rank_collector import RankCollector
    from llmgr_rec.storage.bundle_index import read_index

    collector, world = RankCollector(), World.alone()
    rule, counts = ranking_rule(read_index(bundle.path)), bundle.catalog.train_count_V
    measures = Measures(ranks=collector)
    metrics = evaluate_model(bundle.ranking(), Dataset(dataset), split, world, counts, rule, measures)
    return float(metrics["ndcg@20"]), collector.gather(world)


def _sizes(bundle: Path, dtype: TableDType) -> tuple[float, float]:
    """MiB of the tables of an exported bundle, and of all of it."""
    from llmgr_rec.storage.bundle import open_bundle
    from llmgr_rec.storage.bundle_conversion import convert_bundle

    with tempfile.TemporaryDirectory() as folder:
        written: dict[str, Path] = {}
        convert_bundle(open_bundle(bundle), Path(folder) / "bundle", dtype, written)
        whole = sum(path.stat().st_size for path in (Path(folder) / "bundle").rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in written.values()) / _MIB, whole / _MIB


if __name__ == "__main__":
    run_cli(main)
