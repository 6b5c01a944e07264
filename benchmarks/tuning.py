"""Training of the stages align and behave against the straightforward implementation: targets per second at equal loss.

```sh
python -m benchmarks.tuning
```
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.harness import Side, Spread, benchmark_parser, rate_table, ratio, set_threads, take_turns, write_report
from benchmarks.language_setup import Setup, add_language_arguments, make_config, open_dataset
from benchmarks.straightforward import PlainAlignTask, PlainBehaveTask
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.config import Config, StageName
from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.modules.tasks import AlignTask, BehaveTask, LossAndParts
from llmgr_rec.storage.number_format import resolve_dtype

if TYPE_CHECKING:
    from jsonargparse import Namespace

Task = Callable[[SessionBatch], LossAndParts]

OURS, PLAIN = "llmgr_rec", "straightforward"


@dataclass(frozen=True)
class Comparison:
    """A comparison.

    Args:
        name: As it is printed.
        stage: Training stage.
        one_pass: Whether our side encodes all prefixes of a session in one pass.
    """

    name: str
    stage: StageName
    one_pass: bool = False

    def tasks(self, setup: Setup) -> tuple[Task, Task]:
        """The tasks of both sides."""
        loss_dtype = resolve_dtype(setup.config.loss.dtype)
        if self.stage == "behave":
            ours = BehaveTask(setup.fast, one_pass=self.one_pass, loss_dtype=loss_dtype)
            return ours, PlainBehaveTask(setup.plain)
        weight = setup.config.contrast.weight
        return AlignTask(setup.fast, weight, loss_dtype=loss_dtype), PlainAlignTask(setup.plain, weight)


COMPARISONS = (
    Comparison("stage align", "align"),
    Comparison("stage behave", "behave"),
    Comparison("stage behave, one pass per session", "behave", one_pass=True),
)


class Trainer:
    """Plain optimizer steps.

    Args:
        task: Loss of a batch.
        model: What trains.
        batches: Used in turn, again and again.
    """

    def __init__(self, task: Task, model: nn.Module, batches: Sequence[SessionBatch]) -> None:
        self.task = task
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-4, fused=True)
        self.batches: Iterator[SessionBatch] = cycle(batches)

    def step(self) -> tuple[float, int]:
        """One step; its loss and its number of targets."""
        batch = next(self.batches)
        self.optimizer.zero_grad()
        loss, _ = self.task(batch)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach()), batch.num_sessions

    def targets(self, steps: int) -> float:
        """Targets of some steps."""
        return float(sum(self.step()[1] for _ in range(steps)))


def agreement(ours: Trainer, plain: Trainer, steps: int) -> dict[str, float]:
    """Largest differences of losses and gradients over some steps on the same batches, both relative.

    A gradient's difference is the norm over its whole tensor, relative to the largest norm of any tensor's gradient.
    """
    worst_loss = worst_gradient = 0.0
    for _ in range(steps):
        mine, other = ours.step()[0], plain.step()[0]
        worst_loss = max(worst_loss, abs(mine - other) / abs(other))
        gradients = [{name: p.grad for name, p in side.trained.items() if p.grad is not None} for side in (ours, plain)]
        names = {_bare(name): name for name in gradients[1]}
        scale = max(float(gradient.norm()) for gradient in gradients[1].values())
        for name, gradient in gradients[0].items():
            difference = float((gradient - gradients[1][names[_bare(name)]]).norm())
            worst_gradient = max(worst_gradient, difference / scale)
    return {"steps": steps, "loss": worst_loss, "gradient": worst_gradient}


def _bare(name: str) -> str:
    return name.replace("language_model.decoder.", "")


def main(argv: Sequence[str]) -> None:
    """Command line."""
    parser = benchmark_parser("tuning", "Compares the stages align and behave with the straightforward implementation.")
    add_language_arguments(parser)
    parser.add_argument("--agreement_steps", type=int, default=20, help="Steps over which losses are compared.")
    parser.add_argument("--plain_steps", type=int, default=2, help="Steps of the straightforward side in one turn.")
    args = parse_args(parser, argv)
    set_threads(args.threads)
    config = make_config(args.llm, args.num_layers, args.templates, args.dtype, args.batch_size)
    results = {}
    with TemporaryDirectory() as folder:
        dataset = open_dataset(args.dataset, folder)
        for comparison in COMPARISONS:
            results[comparison.name] = compare(comparison, config, dataset, args)
    write_report(args.output, args.as_dict(), results)


def compare(comparison: Comparison, config: Config, dataset: Dataset, args: "Namespace") -> dict[str, Any]:
    """One comparison: checks that both sides compute the same, then measures their speed."""
    setup = Setup.make(config, dataset)
    ours, plain = comparison.tasks(setup)
    # Prompts show all nodes: for sessions longer than a prompt, one pass and one prompt per prefix differ.
    setup.fast.max_nodes = setup.plain.max_nodes = 0
    batches = setup.batches(comparison.stage, args.agreement_steps, comparison.one_pass)
    same = agreement(Trainer(ours, setup.fast, batches), Trainer(plain, setup.plain, batches), args.agreement_steps)
    setup.fast.max_nodes = setup.plain.max_nodes = config.prompt.max_nodes
    fast = Trainer(ours, setup.fast, setup.batches(comparison.stage, 8, comparison.one_pass))
    # The other side has one prompt per prefix, so its batches are of examples.
    slow = Trainer(plain, setup.plain, setup.batches(comparison.stage, 8))
    sides = [
        Side(OURS, lambda: fast.targets(4 * args.plain_steps)),
        Side(PLAIN, lambda: slow.targets(args.plain_steps)),
    ]
    rates = take_turns(sides, args.rounds)
    gain = ratio(rates, OURS, PLAIN)
    _print_result(comparison.name, rates, gain, same)
    return {"targets_per_s": rate_table(rates), "ratio": asdict(gain), "agreement": same}


def _print_result(name: str, rates: dict[str, list[float]], gain: Spread, same: dict[str, float]) -> None:
    print(f"{name}: {gain} times the targets per second")
    for side, values in rates.items():
        print(f"  {side:16} {Spread.of(values)} targets/s")
    print(f"  over {same['steps']} steps losses differ by {same['loss']:.1e}, gradients by {same['gradient']:.1e}")


if __name__ == "__main__":
    run_cli(main)
