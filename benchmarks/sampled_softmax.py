"""Sampled softmax: training steps over catalogs of growing size, and what the sample costs in quality.

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

METRIC = "ndcg@20"
LEAST_QUALITY = 0.98
# Every reported step has the same work; an epoch's first ones are left to the rounds that do not count.
_STEPS_A_TURN = 10
_GIB_OF_MIB = 1 / 1024


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and measures."""
    parser = benchmark_parser("sampled_softmax", "Measures training with a softmax over sampled items.")
    parser.add_argument(
        "--sizes", type=list[int], default=[100_000, 1_000_000, 10_000_000], help="Catalog sizes; [] measures none."
    )
    parser.add_argument("--optimizer", type=str, default="adagrad", help="As the setting tables.optimizer.")
    parser.add_argument("--sessions", type=int, default=200_000, help="Training sessions at each catalog size.")
    parser.add_argument("--batch_size", type=int, default=512, help="Sessions of a step.")
    parser.add_argument("--sampled_items", type=int, default=8192, help="Draws of a step.")
    parser.add_argument("--seeds", type=int, default=3, help="Seeds of the comparison in quality; 0 leaves it out.")
    parser.add_argument("--epochs", type=int, default=6, help="Epochs of each training run of that comparison.")
    parser.add_argument("--dataset", type=str, help="Prepared data set for it; synthetic sessions where not given.")
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
    """Steps a second at each catalog size; all models are in memory together and take turns."""
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
    """What trains a fresh session recommender some steps further whenever it is called, and its candidates a step."""
    from itertools import count

    from llmgr_rec.distributed.assembly import assemble_recommender, make_collator
    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

    from benchmarks.planted_split import write_split
    from llmgr_rec.config import Config
    from llmgr_rec.data.reader import SamplingOrder, SessionReader
    from llmgr_rec.distributed.sharding import shard
    from llmgr_rec.modules.param_groups import param_group, select_trainable
    from llmgr_rec.modules.tasks import SbrTask
    from llmgr_rec.storage.table_io import init_tables
    from llmgr_rec.training.optimizers import build_optimizer

    config = Config()
    config.loss.full_softmax_max_items, config.loss.num_negatives = 0, args["sampled_items"]
    config.tables.optimizer = args["optimizer"]
    parts, catalog = write_split(folder / "train", args["sessions"], size, mean_length=9, seed=0)
    task = SbrTask(assemble_recommender(config, catalog, "meta"), world.size)
    select_trainable(task, config.sbr.trainable)
    model = shard(task, config.tables, world, lambda name: param_group(name) in config.sbr.trainable)
    init_tables(model, config.seed, config.tables.init_std)
    reader = SessionReader(
        parts,
        num_items=size,
        collate=make_collator(config, catalog, "sbr", language=False),
        order=SamplingOrder(args["batch_size"], shuffle=True),
    )
    pipeline = TrainPipelineSparseDist(model, build_optimizer(model, config.sbr, config.tables), world.device)
    batches = (batch for epoch in count() for batch in reader.batches(epoch))
    model.train()

    def work() -> float:
        for _ in range(_STEPS_A_TURN):
            pipeline.progress(batches)
        return _STEPS_A_TURN

    return work, reader.collated(0, 0).candidates_C.numel()


def compare_quality(folder: Path, args: dict[str, Any], threads: int) -> dict[str, Any]:
    """Best validation NDCG@20 of stage sbr after equal epochs, with the whole catalog and with a sample of it."""
    dataset = args["dataset"] or str(prepare_synthetic(folder, sessions=10_000, items=12_000))
    best: dict[str, list[float]] = {"full": [], "sampled": []}
    for seed in range(args["seeds"]):
        for loss, values in best.items():
            run = folder / f"{loss}-{seed}"
            words = ["--config", "quickstart", "--dataset", dataset, "--output", str(run), "--stage", "sbr"]
            words += ["--blend.neighbors", "[]", "--seed", str(seed), "--sbr.epochs", str(args["epochs"])]
            words += ["--loss.full_softmax_max_items", "0" if loss == "sampled" else str(10**9)]
            words += ["--loss.num_negatives", str(args["sampled_items"]), "--runtime.threads_per_rank", str(threads)]
            run_module("llmgr_rec.train", words)
            values.append(best_validation(run))
    shares = [sampled / full for sampled, full in zip(best["sampled"], best["full"], strict=True)]
    return {METRIC: best, "sampled_of_full": asdict(Spread.of(shares))}


def best_validation(run: Path) -> float:
    """Best validation value of a run, that of the weights it exports."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return max(line[METRIC] for line in lines if line.get("split") == "valid")


def table(results: dict[str, Any]) -> str:
    """What was measured, to read."""
    lines = []
    if steps := results.get("steps"):
        lines += ["", f"{'':20}{'ms a training step':>30}{'distinct candidates':>22}"]
        for name, values in steps["step_ms"].items():
            lines.append(f"{name:20}{Spread(**values)!s:>30}{steps['candidates'][name]:>22,}")
        times = Spread(**steps["largest_takes_times_smallest"])
        lines.append(f"the largest takes {times} times as long as the smallest; peak {steps['peak_gib']:.1f} GiB")
    if quality := results.get("quality"):
        lines += ["", f"{'seed':>6}{'full softmax':>16}{'sampled softmax':>18}   best validation {METRIC.upper()}"]
        pairs = zip(quality[METRIC]["full"], quality[METRIC]["sampled"], strict=True)
        lines += [f"{seed:>6}{full:>16.4f}{sampled:>18.4f}" for seed, (full, sampled) in enumerate(pairs)]
        share = Spread(**quality["sampled_of_full"])
        lines.append(f"sampled reaches {share} of full, target at least {LEAST_QUALITY}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
