"""Training of session recommenders against other libraries: examples per second, NDCG@20, seconds to the same NDCG@20.

```sh
python -m benchmarks.session_recommender --dataset PREPARED --peer rectools_sasrec
python -m benchmarks.session_recommender --dataset PREPARED --peer rectools_esasrec --rounds 200 --patience 5
```

Each side is a process of its own, and they take turns epoch by epoch. The peer runs in a virtual environment of its
own, made with pip on the first run. Our side trains several times: with the peer's settings where both have one; the
same with the matrix products of the loss in bfloat16, where the processor is faster with them; in the faster format
with all prefixes of a session in one pass, where the peer encodes each one; also with the sampled softmax; and by the
recipe `default`. Sides that have not reached the best NDCG@20 of the peer then train on until they have, at most for as
long as the peer trained.

With `--patience`, each side trains until its NDCG@20 stops rising, and `--against` compares the peer at its best
epoch with evaluated models on the test sessions.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.harness import Spread, benchmark_parser, write_report
from benchmarks.turns_protocol import Epoch, Trainer, TrainerFailed
from llmgr_rec.cli import parse_args, progress, run_cli
from llmgr_rec.comma_separated import split_list
from llmgr_rec.errors import UserError
from llmgr_rec.paths import LocalPath

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from benchmarks.peer_quality import EvaluatedModels
    from benchmarks.peers import Peer
    from benchmarks.session_settings import Settings
    from llmgr_rec.data.dataset import Dataset

# Run as a command, this module has another name, under which nothing is shown.
logger = logging.getLogger("llmgr_rec.benchmarks")

SAME, ROUNDED, ONE_PASS = "same settings", "same, loss in bfloat16", "and in one pass"
SAMPLED, DEFAULT = "and sampled softmax", "default recipe"
SIDES = {"same": SAME, "rounded": ROUNDED, "one_pass": ONE_PASS, "sampled": SAMPLED, "default": DEFAULT}
PeerName = Literal["rectools_sasrec", "rectools_esasrec", "recbole_gcsan", "recbole_srgnn"]


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and measures."""
    parser = benchmark_parser(
        "session_recommender",
        "Compares training of the session recommender with that of another library.",
        "--dataset dataset --peer rectools_sasrec",
    )
    parser.add_argument("--dataset", type=LocalPath, required=True, help="Folder made by llmgr_rec.prepare.")
    parser.add_argument("--peer", type=PeerName, default="rectools_sasrec", help="Library and model.")
    parser.add_argument(
        "--sides", type=str, default=",".join(SIDES), help=f"Forms of our side, of {', '.join(SIDES)}; default: all."
    )
    parser.add_argument(
        "--patience",
        type=int,
        default=0,
        help="Epochs without a higher NDCG@20 after which a side ends; --rounds are then the most. 0 trains all.",
    )
    parser.add_argument(
        "--most_minutes", type=float, default=0.0, help="Minutes after which no further round begins; 0 sets no limit."
    )
    parser.add_argument(
        "--against",
        type=LocalPath | None,
        help="Metrics file of llmgr_rec.evaluate, whose models are compared with the peer on test sessions (RecTools).",
    )
    parser.add_argument("--max_examples", type=int, default=0, help="Most training examples; 0 takes all.")
    parser.add_argument("--max_validation", type=int, default=0, help="Most validation examples; 0 takes all.")
    _add_settings(parser)
    parser.add_argument(
        "--environment", type=LocalPath | None, help="Folder of the peer's environment; runs/benchmarks/PACKAGE."
    )
    # A round is one epoch of each side, and the first one counts.
    parser.set_defaults(rounds=3)
    args = parse_args(parser, argv).as_dict()
    for name in ("max_examples", "max_validation", "patience", "most_minutes"):
        if args[name] < 0:
            raise UserError(f"--{name} is {args[name]}; set it to 0 or more")

    from benchmarks.peers import PEERS

    peer = PEERS[args["peer"]]
    with TemporaryDirectory(prefix="llmgr-sessions-") as folder:
        results = compare(Path(folder), peer, args)
    print(table(peer.name, peer.least_ratio, results))
    write_report(args["output"], args, results)


def _add_settings(parser: "ArgumentParser") -> None:
    """Adds what `session_settings.Settings` reads."""
    parser.add_argument("--dim", type=int, default=64, help="Width of item and session vectors.")
    parser.add_argument(
        "--batch_size", type=int | None, help="Examples of a step (RecTools: sessions). Default: 512 (RecTools: 128)."
    )
    parser.add_argument(
        "--padding",
        type=bool | None,
        help="Whether RecTools computes scores at padding, as it does, or only what its loss needs. Default: true.",
    )
    parser.add_argument("--steps", type=int, default=1, help="Message-passing steps (GCSAN, SRGNN).")
    parser.add_argument(
        "--attention_layers", type=int | None, help="Self-attention blocks (not SRGNN). Default: 1 (SASRec: 2)."
    )
    parser.add_argument("--attention_heads", type=int | None, help="Heads of each block. Default: 1 (SASRec: 2).")
    parser.add_argument("--dropout", type=float | None, help="Dropout (not SRGNN). Default: 0.2.")
    parser.add_argument(
        "--score",
        type=Literal["cosine", "dot"] | None,
        help="Score of our side with the peer's settings. Default: cosine (RecTools: dot).",
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="Learning rate of Adam.")
    parser.add_argument(
        "--negatives", type=int | None, help="Negatives of the sampled softmax. Default: 1024 (eSASRec: 256)."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of all sides, and of the choice of examples.")


def compare(folder: Path, peer: "Peer", args: Mapping[str, Any]) -> dict[str, Any]:
    """Trains all sides in turn.

    Args:
        folder: Empty folder for data and runs.
        peer: The other library's model.
        args: Parsed arguments.

    Raises:
        UserError: The data set or the environment is not usable, or a side failed.
    """
    from benchmarks.dataset_part import write_part
    from benchmarks.peer_environment import make_environment
    from benchmarks.peer_quality import BestEpoch
    from benchmarks.session_settings import make_settings
    from benchmarks.time_to_quality import stopped_rising, time_to_quality, train_to_quality
    from llmgr_rec.data.dataset import Dataset

    whole = Dataset(Path(args["dataset"]))
    settings = make_settings(args, **peer.of_settings(whole, args["dim"]))
    ours = chosen_sides(args["sides"], settings)
    against = _against(args, peer, whole)
    python = make_environment(Path(args["environment"] or f"runs/benchmarks/{peer.package.name}"), peer.package)
    most = {"train": args["max_examples"], "valid": args["max_validation"]}
    dataset = write_part(whole, folder / "dataset", most, settings.seed)
    counts = peer.write_files(dataset, folder / "peer")
    test_lists = folder / "test_rankings.npy" if against else None
    peer.write_settings(folder / "peer.json", settings, dataset, folder / "peer", test_lists)
    best_epoch = BestEpoch(dataset, test_lists)
    try:
        with ExitStack() as stack:
            started = _start(folder, peer, ours, settings.threads, dataset, python, best_epoch.measure)
            trainers = [stack.enter_context(trainer) for trainer in started]
            train_in_turns(trainers, settings.rounds, args["patience"], 60 * args["most_minutes"])
            other = trainers[-1]
            best = max(epoch.ndcg for epoch in other.epochs)
            for trainer in trainers[:-1]:
                if not stopped_rising(trainer.epochs, args["patience"]):
                    train_to_quality(trainer, best, other.seconds)
    except TrainerFailed as error:
        raise UserError(str(error)) from None
    check_counts(trainers, counts)
    epochs = {trainer.name: trainer.epochs for trainer in trainers}
    return {
        "examples": counts,
        "items": dataset.manifest.num_items,
        "settings": asdict(settings),
        **rates(epochs, peer.name, settings.rounds),
        "time_to_quality": time_to_quality(epochs, peer.name),
        "epochs": {name: [asdict(epoch) for epoch in of_side] for name, of_side in epochs.items()},
        "arguments": ours,
        "peer": trainers[-1].facts,
        **({"test": against.beside(peer.name, *best_epoch.test)} if against and best_epoch.test else {}),
    }


def _against(args: Mapping[str, Any], peer: "Peer", dataset: "Dataset") -> "EvaluatedModels | None":
    """The models of --against; None without it."""
    from benchmarks.peer_quality import EvaluatedModels

    if not args["against"]:
        return None
    if not peer.ranks_test:
        raise UserError(f"--against needs lists of test sessions, which {peer.name} does not give; leave it out")
    if args["max_examples"]:
        raise UserError("--against compares models of all training examples; leave --max_examples out")
    return EvaluatedModels(Path(args["against"]), dataset)


def _start(
    folder: Path,
    peer: "Peer",
    ours: Mapping[str, list[str]],
    threads: int,
    dataset: "Dataset",
    python: Path,
    measure: Callable[[Path], tuple[float, int]],
) -> Iterator[Trainer]:
    """Starts the sides one after the other; the last one is the peer."""
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": str(threads)}
    for number, (name, words) in enumerate(ours.items()):
        files = ["--dataset", str(dataset.path), "--output", str(folder / f"run{number}")]
        yield Trainer(name, [sys.executable, "-m", "benchmarks.session_trainer", *files, *words], folder, environment)
    command = [str(python), "-m", peer.worker, str(folder / "peer.json")]
    yield Trainer(peer.name, command, folder, environment, measure)


def chosen_sides(names: str, settings: "Settings") -> dict[str, list[str]]:
    """Arguments of the forms of our side that are asked for; those that the settings have no use for are left out.

    Args:
        names: Keys of `SIDES`, separated by commas.
        settings: Settings of all sides.

    Raises:
        UserError: There is no such form.
    """
    asked = split_list(names)
    if unknown := [name for name in asked if name not in SIDES]:
        raise UserError(f"--sides has {unknown[0]}; give some of {', '.join(SIDES)}")
    titles = {SIDES[name] for name in asked}
    return {title: words for title, words in _ours(settings).items() if title in titles}


def _ours(settings: "Settings") -> dict[str, list[str]]:
    """Arguments of each of our sides."""
    from llmgr_rec.storage.number_format import resolve_dtype

    sides, faster = {SAME: settings.same_words()}, "float32"
    if resolve_dtype("auto").itemsize == 2:
        faster = "bfloat16"
        sides[ROUNDED] = settings.same_words(faster)
    one_pass = settings.one_pass_is_exact
    if one_pass and not settings.one_pass:
        sides[ONE_PASS] = settings.same_words(faster, one_pass)
    if not settings.sampled:
        sides[SAMPLED] = settings.same_words(faster, one_pass, sampled=True)
    return {**sides, DEFAULT: settings.default_words()}


def train_in_turns(trainers: Sequence[Trainer], rounds: int, patience: int = 0, most_seconds: float = 0.0) -> None:
    """Trains one epoch of each side in every round, in alternating order; a side that has ended drops out.

    Args:
        trainers: The sides.
        rounds: Most epochs of each.
        patience: Epochs without a higher NDCG@20 after which a side has ended; 0 waits for all.
        most_seconds: Seconds, validation included, after which no further round begins; 0 sets no limit.
    """
    from benchmarks.time_to_quality import stopped_rising

    started = time.perf_counter()
    bar = progress(rounds, "benchmark", "round")
    for number in range(rounds):
        going = [side for side in trainers if not side.ended and not stopped_rising(side.epochs, patience)]
        for trainer in going if number % 2 == 0 else reversed(going):
            trainer.train()
            _log_epoch(trainer)
        bar.update()
        if not going or (most_seconds and time.perf_counter() - started > most_seconds):
            break
    bar.close()


def _log_epoch(trainer: Trainer) -> None:
    # A long comparison that is ended before its last round has left its curves in the log.
    if trainer.epochs and not trainer.ended:
        last = trainer.epochs[-1]
        logger.info(
            "%s: epoch %d, %.1f s in all, NDCG@20 %.4f", trainer.name, len(trainer.epochs), trainer.seconds, last.ndcg
        )


def rates(epochs: Mapping[str, Sequence[Epoch]], peer: str, rounds: int) -> dict[str, Any]:
    """Examples per second of each side, and the ratio to the peer's of the same round.

    Args:
        epochs: Epochs of each side.
        peer: Name of the peer among them.
        rounds: Epochs of the peer; what a side trained afterwards had no turn of the peer beside it.
    """
    elapsed = {name: [epoch.examples / epoch.seconds for epoch in of_side[:rounds]] for name, of_side in epochs.items()}
    processor = {
        name: [epoch.examples / epoch.processor_seconds for epoch in of_side[:rounds]]
        for name, of_side in epochs.items()
    }

    def ratios(of_sides: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
        pairs = {name: zip(values, of_sides[peer], strict=False) for name, values in of_sides.items() if name != peer}
        return {name: asdict(Spread.of([mine / other for mine, other in both])) for name, both in pairs.items()}

    return {
        "examples_per_s": {name: asdict(Spread.of(values)) for name, values in elapsed.items()},
        "ratio": ratios(elapsed),
        "processor_time_ratio": ratios(processor),
    }


def check_counts(trainers: Sequence[Trainer], counts: Mapping[str, int]) -> None:
    """Checks that all sides trained and validated on all examples.

    Raises:
        RuntimeError: One did not.
    """
    for trainer in trainers:
        for epoch in trainer.epochs:
            if (epoch.examples, epoch.validated) != (counts["train"], counts["valid"]):
                raise RuntimeError(f"{trainer.name} reported {epoch}, but there are {counts} examples")


def table(peer: str, least_ratio: float | None, results: Mapping[str, Any]) -> str:
    """The results as text.

    Args:
        peer: Name of the peer.
        least_ratio: How many times as fast our side should be; None where nothing is wanted.
        results: From `compare`.
    """
    counts = results["examples"]
    lines = [
        "",
        f"{counts['train']:,} training and {counts['valid']:,} validation examples, {results['items']:,} items",
        *_rate_lines(peer, results),
        *([f"wanted: {least_ratio:g} times"] if least_ratio else []),
        "",
        *_quality_lines(results["epochs"]),
        "",
        *_time_lines(results["time_to_quality"]),
        *(["", *_test_lines(results["test"])] if "test" in results else []),
    ]
    return "\n".join(lines)


def _rate_lines(peer: str, results: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'':26}{'training examples/s':>30}{f'times {peer}':>32}{'by processor time':>30}"
    for name, values in results["examples_per_s"].items():
        gains = [results[key].get(name) for key in ("ratio", "processor_time_ratio")]
        elapsed, processor = (str(Spread(**gain)) if gain else "" for gain in gains)
        yield f"{name:26}{Spread(**values)!s:>30}{elapsed:>32}{processor:>30}"


def _quality_lines(epochs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    yield f"{'validation NDCG@20':26}" + "".join(f"{name:>26}" for name in epochs)
    for number in range(max(map(len, epochs.values()))):
        row = [f"{of_side[number]['ndcg']:.4f}" if number < len(of_side) else "" for of_side in epochs.values()]
        yield f"{f'after epoch {number + 1}':26}" + "".join(f"{value:>26}" for value in row)


def _time_lines(reached: Mapping[str, Any]) -> Iterator[str]:
    title = f"to NDCG@20 {reached['ndcg']:.4f}"
    yield f"{title:26}{'epochs':>8}{'seconds':>12}{'processor seconds':>20}"
    for name, at in reached["sides"].items():
        if at is None:
            yield f"{name:26}not within the seconds of the peer, or until its training ended"
        else:
            yield f"{name:26}{at['epoch']:>8}{at['seconds']:>12.1f}{at['processor_seconds']:>20.1f}"


def _test_lines(compared: Mapping[str, Any]) -> Iterator[str]:
    shown = ("hr@10", "ndcg@10", "hr@20", "ndcg@20")
    yield f"{'test sessions':26}" + "".join(f"{column.upper():>10}" for column in shown) + "   NDCG@20 over the peer"
    for name, metrics in compared["metrics"].items():
        gain = compared["gains"].get(name, {}).get("ndcg@20")
        over = f"   {100 * gain['mean']:+.1f} % [{100 * gain['low']:.1f} .. {100 * gain['high']:.1f}]" if gain else ""
        yield f"{name:26}" + "".join(f"{metrics[column]:>10.4f}" for column in shown) + over


if __name__ == "__main__":
    run_cli(main)
