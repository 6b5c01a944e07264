"""Utilization of the processor by training and scoring with a language model, in float32 and in bfloat16.

```sh
python -m benchmarks.utilization --threads 1
```

For each format: the throughput of steps relative to that of bare matrix products, and the processor time by kind of
operator. For the two formats: how much faster bfloat16 is, as a whole and by kind. What takes as long in both formats
bounds the whole: with the share s of it in a step in float32, and products that are p times as fast, the step is
1 / (s + (1 - s) / p) times as fast.

The FLOPs are those of the products of linear layers, head and loss. Those of attention are not counted, because some of
them are padding; so the shares are slightly too low.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Side, Spread, benchmark_parser, ratio, set_threads, take_turns, write_report
from benchmarks.language_setup import CPU, Setup, add_model_arguments, make_config, open_dataset
from benchmarks.operator_kinds import KINDS, KindCost, operator_costs
from benchmarks.tuning import Comparison, Trainer
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.config import DType
from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.collate import Collator
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.ranking import RankingModel
from llmgr_rec.modules.prepare_for_inference import prepare_for_inference

if TYPE_CHECKING:
    from jsonargparse import Namespace

PEAK, TRAINING, SCORING = "bare products", "training", "scoring"
FORMATS: tuple[DType, ...] = ("float32", "bfloat16")
_PEAK_SIZE = 2048
_COUNTED = (torch.ops.aten.mm, torch.ops.aten.addmm)
_PROFILE_ROWS = 12


class Scoring:
    """Encodes batches and ranks the catalog as `python -m llmgr_rec.score` does, with LoRA merged.

    Args:
        setup: The model, which is copied.
        batches: Used in turn, again and again.
    """

    def __init__(self, setup: Setup, batches: Sequence[SessionBatch]) -> None:
        model = copy.deepcopy(setup.fast).eval()
        prepare_for_inference(model.language_model)
        collator = Collator(setup.catalog, setup.config.tables.side_features)
        self.ranking = RankingModel(model, collator, setup.config.runtime.eval_batch_size)
        self.ranker = self.ranking.ranker(World.alone())
        self.batches = cycle(batches)

    @torch.no_grad()
    def step(self) -> None:
        """One batch."""
        self.ranker.rank(self.ranking.queries(next(self.batches)), 20)


@dataclass
class Work:
    """Training or scoring in a format.

    Args:
        name: `TRAINING` or `SCORING`.
        steps: Its steps.
        count: Steps of a turn, which are as many batches.
        max_rank: Largest inner size of a product of LoRA.
        num_items: Items of the catalog.
    """

    name: str
    steps: "Scoring | Trainer"
    count: int
    max_rank: int
    num_items: int

    def turn(self) -> float:
        """All batches once; returns their number."""
        for _ in range(self.count):
            self.steps.step()
        return float(self.count)

    def flops(self) -> float:
        """FLOPs of the linear layers, the head and the loss in a turn."""
        with FlopCounterMode(display=False) as counter:
            self.turn()
        by_operator = counter.get_flop_counts()["Global"]
        return float(sum(by_operator.get(operator, 0) for operator in _COUNTED))

    def costs(self, turn_s: float) -> tuple[dict[str, KindCost], dict[str, float]]:
        """Costs of a turn by kind of operator, and seconds by operator; see `operator_costs`."""
        return operator_costs(self.turn, turn_s, self.max_rank, self.num_items)


def works(dataset: Dataset, dtype: DType, args: "Namespace") -> list[Work]:
    """Training, by stage behave, and scoring in a format."""
    config = make_config(args.llm, args.num_layers, args.templates, dtype, args.batch_size)
    setup = Setup.make(config, dataset)
    task, _ = Comparison("training", "behave", args.one_pass).tasks(setup)
    training = Trainer(task, setup.fast, setup.batches("behave", args.batches, args.one_pass))
    config.behave.batch_size = config.runtime.eval_batch_size
    scoring = Scoring(setup, setup.batches("behave", args.batches))
    # Three layers of attention share the product with their matrices A.
    sizes = args.batches, 3 * config.llm.lora_rank, setup.catalog.num_items
    return [Work(TRAINING, training, *sizes), Work(SCORING, scoring, *sizes)]


def peak_work(dtype: torch.dtype) -> float:
    """A bare product of large square matrices; returns its FLOPs."""
    left, right = (torch.ones(_PEAK_SIZE, _PEAK_SIZE, dtype=dtype) for _ in range(2))
    for _ in range(4):
        torch.mm(left, right)
    return 4 * 2.0 * _PEAK_SIZE**3


def main(argv: Sequence[str]) -> None:
    """Command line."""
    parser = benchmark_parser("utilization", "Compares training and scoring with bare products, by number format.")
    add_model_arguments(parser)
    parser.add_argument("--one_pass", type=bool, default=True, help="Train with one pass per session.")
    parser.add_argument("--batches", type=int, default=4, help="Batches of a turn.")
    args = parse_args(parser, argv)
    set_threads(args.threads)
    with TemporaryDirectory() as folder:
        dataset = open_dataset(args.dataset, folder)
        by_format = {dtype: works(dataset, dtype, args) for dtype in FORMATS}
    sides = [
        Side(f"{PEAK}, {dtype}", lambda dtype=dtype: peak_work(getattr(torch, dtype)))  # type: ignore[misc]
        for dtype in FORMATS
    ]
    sides += [Side(f"{work.name}, {dtype}", work.turn) for dtype in FORMATS for work in by_format[dtype]]
    rates = take_turns(sides, args.rounds, clock=time.process_time)
    results: dict[str, Any] = {dtype: report_format(dtype, by_format[dtype], rates) for dtype in FORMATS}
    results["gain"] = {
        name: asdict(ratio(rates, f"{name}, bfloat16", f"{name}, float32")) for name in (PEAK, TRAINING, SCORING)
    }
    print_gains(results)
    write_report(args.output, args.as_dict(), results)


def report_format(dtype: str, both: Sequence[Work], rates: dict[str, list[float]]) -> dict[str, object]:
    """Throughput relative to bare products, and costs by kind of operator, of training and scoring."""
    peak = rates[f"{PEAK}, {dtype}"]
    found: dict[str, object] = {"peak_gflops": asdict(Spread.of([rate / 1e9 for rate in peak]))}
    print(f"{dtype}: {PEAK} {Spread.of([rate / 1e9 for rate in peak])} GFLOP/s on {CPU}")
    for work in both:
        turns = rates[f"{work.name}, {dtype}"]
        # A rate is in steps a second.
        flops = work.flops() / work.count
        share = Spread.of([rate * flops / other for rate, other in zip(turns, peak, strict=True)])
        costs, operators = work.costs(work.count / Spread.of(turns).median)
        print(f"  {work.name}: {Spread.of([1e3 / rate for rate in turns])} ms a step, {share} of the peak")
        for operator, seconds in list(operators.items())[:_PROFILE_ROWS]:
            print(f"    {seconds / work.count * 1e3:8.2f} ms  {operator}")
        found[work.name] = {
            "share": asdict(share),
            "ms": {kind: cost.seconds / work.count * 1e3 for kind, cost in costs.items()},
            "gflops": {kind: cost.gflops for kind, cost in costs.items() if cost.flops},
            "operators_ms": {name: seconds / work.count * 1e3 for name, seconds in operators.items()},
        }
    return found


def print_gains(results: dict[str, Any]) -> None:
    """Prints how much faster bfloat16 is, as a whole and by kind of operator."""
    print(f"{PEAK}: bfloat16 {Spread(**results['gain'][PEAK])} times as fast")
    for name in (TRAINING, SCORING):
        print(f"{name}: bfloat16 {Spread(**results['gain'][name])} times as fast; ms a step in float32 and bfloat16")
        wide, narrow = (results[dtype][name] for dtype in FORMATS)
        for kind in KINDS:
            before, after = wide["ms"][kind], narrow["ms"][kind]
            rates = [f"{side['gflops'][kind]:.0f}" for side in (wide, narrow) if kind in side["gflops"]]
            speeds = f", {' and '.join(rates)} GFLOP/s" if rates else ""
            print(f"  {before:8.1f} {after:8.1f}  {before / after if after else 0:5.2f} x  {kind}{speeds}")


if __name__ == "__main__":
    run_cli(main)
