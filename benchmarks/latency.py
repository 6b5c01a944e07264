"""Latency of one session through `Recommender.recommend`, of untrained models of the default recipe.

```sh
python -m benchmarks.latency
python -m benchmarks.latency --items [1000000] --sessions 100 --rounds 2 --index true
```

Random vectors have no structure, and no index finds neighbors among them. So items have topics with words of their own,
which titles share with a Zipf distribution; the vectors of ids are small beside those of words; neighbors of an item,
and items of a session, are near in the catalog, and so mostly of one topic; and the weights of the encoder are small,
so that a session's vector is near that of its last item.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import benchmark_parser, set_threads, write_report
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.errors import UserError
from llmgr_rec.library_imports import collector_paused

# Items that a benchmark makes similar to each item, as item-kNN and text-kNN do on Amazon Beauty.
_NEIGHBORS = 160
_WORDS_PER_ITEM, _ITEMS_PER_TOPIC, _WORDS_PER_TOPIC = 8, 500, 40
_LONGEST_SESSION = 12
# Scale of the vectors of ids and of the encoder's weights relative to those at the start of a training.
_SCALE = 0.1
# Wanted recall of an index, and the places that it is measured for.
_RECALL, _PLACES = 0.99, 20
_WARM_UP = 20


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and measures."""
    parser = benchmark_parser("latency", "Measures the time of recommendations for one session at a time.")
    parser.set_defaults(threads=1, rounds=3)
    parser.add_argument("--items", type=list[int], default=[12_101, 1_000_000], help="Sizes of the catalog.")
    parser.add_argument("--sessions", type=int, default=500, help="Sessions of a round.")
    parser.add_argument("--k", type=int, default=10, help="Items per session.")
    parser.add_argument("--index", type=bool, default=False, help="Also rank by an index, and print its recall.")
    args = parse_args(parser, argv).as_dict()
    for name in ("rounds", "sessions", "k"):
        if args[name] < 1:
            raise UserError(f"--{name} is {args[name]}; set it to 1 or more")
    args["threads"] = set_threads(args["threads"])
    results = {
        str(items): measure(items, args["sessions"], args["k"], args["rounds"], args["index"])
        for items in args["items"]
    }
    print(table(results, args["threads"]))
    write_report(args["output"], args, results)


def measure(num_items: int, sessions: int, k: int, rounds: int, index: bool = False) -> dict[str, dict[str, float]]:
    """Percentiles of the milliseconds of a call, in wall-clock and in processor time; the best round of each.

    Args:
        num_items: Items of the catalog.
        sessions: Calls of a round.
        k: Length of a list.
        rounds: Rounds.
        index: Whether to measure calls that rank by an index, too.

    Returns:
        Percentiles by kind of time, those with an index as `index wall` and `index cpu`, and then its recall: of the
        model's scores for its sample sessions, and of the lists, blend included.
    """
    import numpy as np

    with collector_paused():
        from llmgr_rec import Recommender

    with tempfile.TemporaryDirectory(prefix="llmgr-latency-") as folder:
        bundle = untrained_bundle(Path(folder), num_items)
        recommender = Recommender.load(bundle)
        rng = np.random.default_rng(1)
        lengths = rng.integers(1, _LONGEST_SESSION + 1, sessions)
        firsts = rng.integers(0, num_items, sessions)
        asked = [
            [f"item{item % num_items}" for item in first + rng.integers(0, _NEIGHBORS, length)]
            for first, length in zip(firsts, lengths, strict=True)
        ]
        results = _percentiles(recommender, asked, k, rounds)
        if index:
            exact = [recommender.recommend([session], _PLACES)["item_ids"][0].as_py() for session in asked]
            del recommender
            recommender = Recommender.load(bundle, index=_RECALL)
            results |= {f"index {kind}": of for kind, of in _percentiles(recommender, asked, k, rounds).items()}
            found = [recommender.recommend([session], _PLACES)["item_ids"][0].as_py() for session in asked]
            shares = [len(set(ours) & set(theirs)) / _PLACES for ours, theirs in zip(found, exact, strict=True)]
            measured = float("nan") if recommender.index_recall is None else recommender.index_recall
            results["recall"] = {"of samples": measured, "of lists": float(np.mean(shares))}
        return results


def _percentiles(recommender: Any, asked: list[list[str]], k: int, rounds: int) -> dict[str, dict[str, float]]:
    """Percentiles of the milliseconds of a call by kind of time, each of the best round."""
    import numpy as np

    for session in asked[:_WARM_UP]:
        recommender.recommend([session], k=k)

    def percentiles(clock: Callable[[], float]) -> dict[str, float]:
        times = []
        for session in asked:
            started = clock()
            recommender.recommend([session], k=k)
            times.append(1000 * (clock() - started))
        return {name: float(np.percentile(times, share)) for name, share in (("p50", 50), ("p99", 99))}

    found: dict[str, list[dict[str, float]]] = {"wall": [], "cpu": []}
    for _ in range(rounds):
        found["wall"].append(percentiles(time.perf_counter))
        found["cpu"].append(percentiles(time.process_time))
    return {
        kind: {name: min(values[name] for values in of_rounds) for name in ("p50", "p99")}
        for kind, of_rounds in found.items()
    }


def untrained_bundle(folder: Path, num_items: int) -> Path:
    """Writes a bundle of the default recipe with random weights, neighbors and words."""
    import torch

    from llmgr_rec.config import Config
    from llmgr_rec.data.catalog import Catalog
    from llmgr_rec.distributed.process_group import World
    from llmgr_rec.storage.bundle_export import export_bundle
    from llmgr_rec.storage.model_factory import ModelFactory
    from llmgr_rec.storage.table_io import init_tables

    config = Config()
    _write_items(folder / "items.parquet", num_items)
    catalog = Catalog.load(folder)
    factory, cpu = ModelFactory(), torch.device("cpu")
    model = factory.build(factory.spec("sbr", config, catalog), None, cpu)
    init_tables(model, config.seed, 0.1)
    for name, table in model.named_parameters():
        if name.endswith("item_id.weight") or name.startswith("encoder."):
            table.data.mul_(_SCALE)
    export_bundle(model, "sbr", config, catalog, folder / "bundle", World.alone(), blend=_random_blend(num_items))
    return folder / "bundle"


def _write_items(file: Path, num_items: int) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from llmgr_rec.data.schema import items_schema

    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, _WORDS_PER_TOPIC + 1)
    places = rng.choice(_WORDS_PER_TOPIC, (num_items, _WORDS_PER_ITEM), p=shares / shares.sum())
    words = (np.arange(num_items)[:, None] // _ITEMS_PER_TOPIC * _WORDS_PER_TOPIC + places).ravel()
    offsets = np.arange(0, len(words) + 1, _WORDS_PER_ITEM, dtype=np.int32)
    nothing = pa.array([[]] * num_items, pa.list_(pa.int64()))
    columns = {
        "index": np.arange(num_items),
        "item_id": [f"item{item}" for item in range(num_items)],
        "title": [f"Item {item}" for item in range(num_items)],
        **dict.fromkeys(("category", "brand", "description"), pa.nulls(num_items, pa.string())),
        "train_count": rng.integers(1, 100, num_items),
        "category_ids": nothing,
        "brand_ids": nothing,
        "word_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(words)),
    }
    pq.write_table(pa.table(columns, schema=items_schema(pa.string())), file)


def _random_blend(num_items: int) -> Any:
    import numpy as np
    from scipy import sparse

    from llmgr_rec.baselines.blend import Blend

    rng = np.random.default_rng(2)
    count = min(_NEIGHBORS, num_items)
    neighbors = np.sort((np.arange(num_items)[:, None] + np.arange(count)) % num_items, axis=1)
    starts = np.arange(0, num_items * count + 1, count)
    values = rng.random(num_items * count, dtype=np.float32)
    similarity = sparse.csr_array((values, neighbors.ravel(), starts), shape=(num_items, num_items))
    return Blend({"item_knn": 1.0}, similarity, 0.7)


def table(results: dict[str, dict[str, dict[str, float]]], threads: int) -> str:
    """The results as text."""
    lines = ["", f"{'items':>12}{'':>7}{'p50, ms':>12}{'p99, ms':>12}{'p50, CPU ms':>14}{'p99, CPU ms':>14}"]
    for items, found in results.items():
        for kind, prefix in (("exact", ""), ("index", "index ")):
            if f"{prefix}wall" in found:
                wall, cpu = found[f"{prefix}wall"], found[f"{prefix}cpu"]
                times = f"{wall['p50']:>12.2f}{wall['p99']:>12.2f}{cpu['p50']:>14.2f}{cpu['p99']:>14.2f}"
                lines.append(f"{int(items):>12,}{kind:>7}{times}")
        lines += [
            f"{int(items):>12,}  recall@20 {name}: {value:.4f}" for name, value in found.get("recall", {}).items()
        ]
    lines.append(f"one session a call, threads: {threads}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
