"""Utilization of the processor by training and scoring: their FLOPs per second over those of bare matrix products.

```sh
python -m benchmarks.utilization
```

Counted are the matrix products of the linear layers, the head and the loss. Those of attention are not counted, because
some of them are padding; so the shares are slightly too low.
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Side, Spread, benchmark_parser, ratio, set_threads, take_turns, write_report
from benchmarks.language_setup import CPU, Setup, add_language_arguments, make_config, open_dataset
from benchmarks.tuning import Comparison, Trainer
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.collate import Collator
from llmgr_rec.kernels.topk import top_k

PEAK, TRAINING, SCORING = "bare products", "training", "scoring"
_PEAK_SIZE = 2048
_COUNTED = (torch.ops.aten.mm, torch.ops.aten.addmm)
_PROFILE_ROWS = 12


class Scoring:
    """Encodes batches and ranks the catalog.

    Args:
        setup: The model.
        batches: Used in turn, again and again.
    """

    def __init__(self, setup: Setup, batches: Sequence[SessionBatch]) -> None:
        self.model = setup.fast
        collator = Collator(setup.catalog, setup.config.tables.side_features)
        with torch.no_grad():
            self.items_VQ = self.model.item_vectors(collator.item_features(torch.arange(setup.catalog.num_items)))
        self.batches = cycle(batches)

    @torch.no_grad()
    def step(self) -> None:
        """One batch."""
        self.model.eval()
        top_k(self.model(next(self.batches)), self.items_VQ, 20)
        self.model.train()


def flops(work: "Scoring | Trainer", steps: int) -> list[float]:
    """FLOPs of the linear layers, the head and the loss in each of some steps."""
    counts = []
    for _ in range(steps):
        with FlopCounterMode(display=False) as counter:
            work.step()
        by_operator = counter.get_flop_counts()["Global"]
        counts.append(float(sum(by_operator.get(operator, 0) for operator in _COUNTED)))
    return counts


def peak_work(dtype: torch.dtype) -> float:
    """A bare product of large square matrices; returns its FLOPs."""
    left, right = (torch.ones(_PEAK_SIZE, _PEAK_SIZE, dtype=dtype) for _ in range(2))
    for _ in range(4):
        torch.mm(left, right)
    return 4 * 2.0 * _PEAK_SIZE**3


def time_by_operator(work: "Scoring | Trainer") -> dict[str, float]:
    """Share of each operator in the self CPU time of a step, largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work.step()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    largest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:_PROFILE_ROWS]
    return {event.key: event.self_cpu_time_total / total for event in largest}


def main(argv: Sequence[str]) -> None:
    """Command line."""
    parser = benchmark_parser("utilization", "Compares training and scoring with the peak of bare matrix products.")
    add_language_arguments(parser)
    parser.add_argument("--one_pass", type=bool, default=True, help="Train with one pass per session.")
    args = parse_args(parser, argv)
    set_threads(args.threads)
    config = make_config(args.llm, args.num_layers, args.templates, args.dtype, args.batch_size)
    with TemporaryDirectory() as folder:
        setup = Setup.make(config, open_dataset(args.dataset, folder))
    steps = 4
    task, _ = Comparison("training", "behave", args.one_pass).tasks(setup)
    training = Trainer(task, setup.fast, setup.batches("behave", steps, args.one_pass))
    scoring = Scoring(setup, setup.batches("behave", steps))
    needed = {TRAINING: sum(flops(training, steps)), SCORING: sum(flops(scoring, steps))}
    dtype = setup.fast.language_model.base.dtype

    def run(work: Scoring | Trainer, name: str) -> float:
        for _ in range(steps):
            work.step()
        return needed[name]

    sides = [
        Side(PEAK, lambda: peak_work(dtype)),
        Side(TRAINING, lambda: run(training, TRAINING)),
        Side(SCORING, lambda: run(scoring, SCORING)),
    ]
    rates = take_turns(sides, args.rounds)
    shares = {name: ratio(rates, name, PEAK) for name in (TRAINING, SCORING)}
    profiles = {TRAINING: time_by_operator(training), SCORING: time_by_operator(scoring)}
    print(f"{PEAK}: {Spread.of([rate / 1e9 for rate in rates[PEAK]])} GFLOP/s, {args.dtype} on {CPU}")
    for name, share in shares.items():
        print(f"{name}: {share} of the peak")
        for operator, part in profiles[name].items():
            print(f"  {part:6.1%}  {operator}")
    results = {
        "peak_gflops": asdict(Spread.of([rate / 1e9 for rate in rates[PEAK]])),
        "shares": {name: asdict(share) for name, share in shares.items()},
        "profiles": profiles,
    }
    write_report(args.output, args.as_dict(), results)


if __name__ == "__main__":
    run_cli(main)
