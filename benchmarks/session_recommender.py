"""Training of the session recommender against RecBole's GCSAN and SRGNN: examples per second, NDCG@20 after each epoch.

```sh
python -m benchmarks.session_recommender --dataset PREPARED --encoder gcsan
```

Each side is a process of its own, and they take turns epoch by epoch. RecBole runs in a virtual environment of its own,
made with pip on the first run. Our side trains two or three times: with RecBole's settings where both have one; the
same with the matrix products of the loss in bfloat16, where the processor supports it; and with the default settings.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.harness import Side, Spread, benchmark_parser, rate_table, ratio, take_turns, write_report
from benchmarks.turns_protocol import Trainer, TrainerFailed
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.errors import UserError
from llmgr_rec.paths import LocalPath

if TYPE_CHECKING:
    from benchmarks.session_settings import Settings
    from llmgr_rec.data.dataset import Dataset

SAME, ROUNDED, DEFAULT, PEER = "same settings", "same, loss in bfloat16", "default settings", "RecBole"
LEAST_TIMES = {"gcsan": 15.0, "srgnn": 10.0}


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and measures."""
    parser = benchmark_parser(
        "session_recommender",
        "Compares training of the session recommender with RecBole's.",
        "--dataset dataset --encoder gcsan",
    )
    parser.add_argument("--dataset", type=LocalPath, required=True, help="Folder made by llmgr_rec.prepare.")
    parser.add_argument("--encoder", type=Literal["gcsan", "srgnn"], default="gcsan", help="Model.")
    parser.add_argument("--max_examples", type=int, default=0, help="Most training examples; 0 takes all.")
    parser.add_argument("--max_validation", type=int, default=0, help="Most validation examples; 0 takes all.")
    parser.add_argument("--dim", type=int, default=64, help="Width of item and session vectors.")
    parser.add_argument("--batch_size", type=int, default=512, help="Examples of a step.")
    parser.add_argument("--steps", type=int, default=1, help="Message-passing steps.")
    parser.add_argument("--attention_layers", type=int, default=1, help="Self-attention blocks (gcsan).")
    parser.add_argument("--attention_heads", type=int, default=1, help="Heads of each block (gcsan).")
    parser.add_argument("--dropout", type=float, default=0.2, help="Dropout (gcsan).")
    parser.add_argument(
        "--score", type=Literal["cosine", "dot"], default="cosine", help="Score of our side with RecBole's settings."
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="Learning rate of Adam.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of both sides, and of the choice of examples.")
    parser.add_argument(
        "--environment", type=LocalPath, default="runs/benchmarks/recbole", help="Folder of RecBole's environment."
    )
    # A round is one epoch of each side, and the first one counts.
    parser.set_defaults(rounds=3)
    args = parse_args(parser, argv).as_dict()
    for name in ("max_examples", "max_validation"):
        if args[name] < 0:
            raise UserError(f"--{name} is {args[name]}; set it to 0 or more")

    from benchmarks.session_settings import make_settings

    settings = make_settings(args)
    with TemporaryDirectory(prefix="llmgr-sessions-") as folder:
        results = compare(Path(folder), settings, args)
    print(table(settings.encoder, results))
    write_report(args["output"], {**args, **asdict(settings)}, results)


def compare(folder: Path, settings: "Settings", args: Mapping[str, Any]) -> dict[str, Any]:
    """Trains all sides in turn.

    Args:
        folder: Empty folder for data and runs.
        settings: Shared settings.
        args: Parsed arguments.

    Raises:
        UserError: The data set or the environment is not usable, or a side failed.
    """
    from benchmarks.recbole_environment import make_environment
    from benchmarks.recbole_files import write_atomic_files, write_part
    from llmgr_rec.data.dataset import Dataset

    whole = Dataset(Path(args["dataset"]))
    python = make_environment(Path(args["environment"]))
    most = {"train": args["max_examples"], "valid": args["max_validation"]}
    dataset = write_part(whole, folder / "dataset", most, settings.seed)
    counts = write_atomic_files(dataset, folder / "recbole")
    try:
        with ExitStack() as stack:
            trainers = [stack.enter_context(trainer) for trainer in _start(folder, settings, dataset, python)]
            rates = train_in_turns(trainers, settings.rounds)
    except TrainerFailed as error:
        raise UserError(str(error)) from None
    check_counts(trainers, counts)
    return {
        "examples": counts,
        "items": dataset.manifest.num_items,
        "examples_per_s": rate_table(rates),
        "ratio": {name: asdict(ratio(rates, name, PEER)) for name in rates if name != PEER},
        "epochs": {trainer.name: [asdict(epoch) for epoch in trainer.epochs] for trainer in trainers},
        "arguments": {**_ours(settings), PEER: settings.recbole(Path(), dataset.manifest.max_length)},
        "peer": trainers[-1].facts,
    }


def _start(folder: Path, settings: "Settings", dataset: "Dataset", python: Path) -> Iterator[Trainer]:
    """Starts the sides one after the other; the last one is RecBole."""
    root = Path(__file__).parents[1]
    environment = {
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": str(settings.threads),
    }
    for number, (name, words) in enumerate(_ours(settings).items()):
        files = ["--dataset", str(dataset.path), "--output", str(folder / f"run{number}")]
        command = [sys.executable, "-m", "benchmarks.session_trainer", *files, *words]
        yield Trainer(name, command, folder, environment)
    file = folder / "recbole.json"
    file.write_text(json.dumps(settings.recbole(folder / "recbole", dataset.manifest.max_length)))
    command = [str(python), "-m", "benchmarks.recbole_worker", str(file)]
    yield Trainer(PEER, command, folder, environment)


def _ours(settings: "Settings") -> dict[str, list[str]]:
    """Arguments of each of our sides."""
    from llmgr_rec.storage.number_format import resolve_dtype

    sides = {SAME: settings.recbole_words()}
    if resolve_dtype("auto").itemsize == 2:
        sides[ROUNDED] = settings.recbole_words(loss_dtype="bfloat16")
    return {**sides, DEFAULT: settings.default_words()}


def train_in_turns(trainers: Sequence[Trainer], epochs: int) -> dict[str, list[float]]:
    """Training examples per second of each side, one value per epoch; only training time counts."""

    def trained_seconds() -> float:
        return sum(trainer.seconds for trainer in trainers)

    sides = [Side(trainer.name, trainer.train) for trainer in trainers]
    return take_turns(sides, epochs, warm_up=0, clock=trained_seconds)


def check_counts(trainers: Sequence[Trainer], counts: Mapping[str, int]) -> None:
    """Checks that all sides trained and validated on all examples.

    Raises:
        RuntimeError: One did not.
    """
    for trainer in trainers:
        for epoch in trainer.epochs:
            if (epoch.examples, epoch.validated) != (counts["train"], counts["valid"]):
                raise RuntimeError(f"{trainer.name} reported {epoch}, but there are {counts} examples")


def table(encoder: str, results: Mapping[str, Any]) -> str:
    """The results as text."""
    counts, epochs = results["examples"], results["epochs"]
    lines = [
        "",
        f"{encoder}: {counts['train']:,} training and {counts['valid']:,} validation examples, "
        f"{results['items']:,} items",
        f"{'':28}{'training examples/s':>34}   times RecBole (at least {LEAST_TIMES[encoder]:g})",
    ]
    for name, values in results["examples_per_s"].items():
        gain = results["ratio"].get(name)
        lines.append(f"{name:28}{Spread(**values)!s:>34}   {Spread(**gain) if gain else ''}")
    lines += ["", f"{'validation NDCG@20':28}" + "".join(f"{name:>28}" for name in epochs)]
    for number, row in enumerate(zip(*epochs.values(), strict=True), start=1):
        lines.append(f"{f'after epoch {number}':28}" + "".join(f"{epoch['ndcg']:>28.4f}" for epoch in row))
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
