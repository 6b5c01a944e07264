"""Sampled softmax: time of a training step by catalog size, and the quality compared with the full softmax.

```sh
python -m benchmarks.sampled_softmax
```

The steps are those of stage sbr: reader, sampled candidates, sharded tables with a fused optimizer, session encoder.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.commands import prepare_synthetic, run_module
from benchmarks.harness import (
    Side,
    Spread,
    benchmark_parser,
    peak_memory_mib,
    rate_table,
    ratio,
    set_threads,
    take_turns,
    write_report,
)
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.errors import UserError
from llmgr_rec.paths import LocalPath

METRIC = "ndcg@20"
LEAST_QUALITY = 0.98
# Training steps per round. The first steps of an epoch fall into the warm-up rounds.
_STEPS_PER_ROUND = 10
_GIB_OF_MIB = 1 / 1024


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and measures."""
    parser = benchmark_parser("sampled_softmax", "Measures training with a sampled softmax.")
    parser.add_argument(
        "--sizes",
        type=list[int],
        default=[100_000, 1_000_000, 10_000_000],
        help="Catalog sizes; [] skips this measurement.",
    )
    parser.add_argument("--optimizer", type=str, default="adagrad", help="Setting tables.optimizer.")
    parser.add_argument("--sessions", type=int, default=200_000, help="Training sessions at each catalog size.")
    parser.add_argument("--batch_size", type=int, default=512, help="Sessions of a step.")
    parser.add_argument("--num_negatives", type=int, default=8192, help="Negatives per step.")
    parser.add_argument("--seeds", type=int, default=3, help="Seeds of the comparison of quality; 0 skips it.")
    parser.add_argument("--epochs", type=int, default=6, help="Epochs of each training run of that comparison.")
    parser.add_argument("--dataset", type=LocalPath, help="Prepared data set for it; by default synthetic sessions.")
    args = parse_args(parser, argv).as_dict()
    if args["optimizer"] not in ("adagrad", "rowwise_adagrad", "sgd"):
        raise UserError(f"--optimizer is {args['optimizer']}; fused ones are adagrad, rowwise_adagrad and sgd")
    if args["sizes"] and min(args["sizes"]) < 32:
        raise UserError(f"--sizes holds {min(args['sizes'])}; a catalog has 32 items or more")
    threads = set_threads(args["threads"])
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="llmgr-softmax-") as folder:
        if args["sizes"]:
            results["steps"] = compare_sizes(Path(folder), args, threads)
        if args["seeds"]:
            results["quality"] = compare_quality(Path(folder), args, threads)
    print(table(results))
    write_report(args["output"], {**args, "threads": threads}, results)


def compare_sizes(folder: Path, args: dict[str, Any], threads: int) -> dict[str, Any]:
    """Steps per second at each catalog size; all models are in memory at once and take turns."""
    from llmgr_rec.distributed.process_group import init_distributed, shutdown

    world = init_distributed("cpu", timeout_s=600, threads=threads)
    try:
        sides, candidates = [], {}
        for size in args["sizes"]:
            work, candidates[f"{size:,} items"] = _training_steps(folder / str(size), size, args, world)
            sides.append(Side(f"{size:,} items", work))
        rates = take_turns(sides, args["rounds"], warm_up=2)
    finally:
        shutdown()
    smallest, largest = sides[0].name, sides[-1].name
    milliseconds = {name: asdict(Spread.of([1000 / rate for rate in values])) for name, values in rates.items()}
    return {
        "steps_per_s": rate_table(rates),
        "step_ms": milliseconds,
        "candidates": candidates,
        "largest_takes_times_smallest": asdict(ratio(rates, smallest, largest)),
        "peak_gib": peak_memory_mib() * _GIB_OF_MIB,
    }


def _training_steps(folder: Path, size: int, args: dict[str, Any], world: Any) -> tuple[Callable[[], float], int]:
    """A function that trains a new session recommender for some more steps, and the number of candidates per step."""
    from itertools import count

    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

    from benchmarks.planted_split import write_split
    from llmgr_rec.config import Config
    from llmgr_rec.data.reader import SamplingOrder, SessionReader
    from llmgr_rec.distributed.sharding import shard
    from llmgr_rec.modules.param_groups import param_group, select_trainable
    from llmgr_rec.storage.model_factory import ModelFactory
    from llmgr_rec.storage.table_io import init_tables
    from llmgr_rec.training.optimizers import build_optimizer

    config = Config()
    config.loss.full_softmax_max_items, config.loss.num_negatives = 0, args["num_negatives"]
    config.tables.optimizer = args["optimizer"]
    parts, catalog = write_split(folder / "train", args["sessions"], size, mean_length=9, seed=0)
    factory = ModelFactory()
    spec = factory.spec("sbr", config, catalog)
    task = spec.build_task(factory.build(spec, None, "meta"), world.size)
    select_trainable(task, spec.trains)
    model = shard(task, config.tables, world, lambda name: param_group(name) in spec.trains)
    init_tables(model, config.seed, config.tables.init_std)
    reader = SessionReader(
        parts,
        num_items=size,
        collate=factory.collator(spec, catalog, "train"),
        order=SamplingOrder(args["batch_size"], shuffle=True),
    )
    pipeline = TrainPipelineSparseDist(model, build_optimizer(model, config.sbr, config), world.device)
    batches = (batch for epoch in count() for batch in reader.batches(epoch))
    model.train()

    def work() -> float:
        for _ in range(_STEPS_PER_ROUND):
            pipeline.progress(batches)
        return _STEPS_PER_ROUND

    return work, reader.collated(0, 0).candidates_C.numel()


def compare_quality(folder: Path, args: dict[str, Any], threads: int) -> dict[str, Any]:
    """Best validation NDCG@20 of stage sbr after the same number of epochs, with full and with sampled softmax."""
    dataset = args["dataset"] or str(prepare_synthetic(folder, sessions=10_000, items=12_000))
    best: dict[str, list[float]] = {"full": [], "sampled": []}
    for seed in range(args["seeds"]):
        for loss, values in best.items():
            run = folder / f"{loss}-{seed}"
            words = ["--config", "quickstart", "--dataset", dataset, "--output", str(run), "--stage", "sbr"]
            words += ["--blend.neighbors", "[]", "--seed", str(seed), "--sbr.epochs", str(args["epochs"])]
            words += ["--loss.full_softmax_max_items", "0" if loss == "sampled" else str(10**9)]
            words += ["--loss.num_negatives", str(args["num_negatives"]), "--runtime.threads_per_rank", str(threads)]
            run_module("llmgr_rec.train", words)
            values.append(best_validation(run))
    shares = [sampled / full for sampled, full in zip(best["sampled"], best["full"], strict=True)]
    return {METRIC: best, "sampled_of_full": asdict(Spread.of(shares))}


def best_validation(run: Path) -> float:
    """Best validation value of a run, that of the exported weights."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return max(line[METRIC] for line in lines if line.get("split") == "valid")


def table(results: dict[str, Any]) -> str:
    """The results as text."""
    lines = []
    if steps := results.get("steps"):
        lines += ["", f"{'':20}{'ms per training step':>30}{'distinct candidates':>22}"]
        for name, values in steps["step_ms"].items():
            lines.append(f"{name:20}{Spread(**values)!s:>30}{steps['candidates'][name]:>22,}")
        times = Spread(**steps["largest_takes_times_smallest"])
        lines.append(
            f"largest catalog: {times} times the time of the smallest; peak memory {steps['peak_gib']:.1f} GiB"
        )
    if quality := results.get("quality"):
        lines += ["", f"{'seed':>6}{'full softmax':>16}{'sampled softmax':>18}   best validation {METRIC.upper()}"]
        pairs = zip(quality[METRIC]["full"], quality[METRIC]["sampled"], strict=True)
        lines += [f"{seed:>6}{full:>16.4f}{sampled:>18.4f}" for seed, (full, sampled) in enumerate(pairs)]
        share = Spread(**quality["sampled_of_full"])
        lines.append(f"sampled softmax reaches {share} of full softmax, target at least {LEAST_QUALITY}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
