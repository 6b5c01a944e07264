"""Reader and session graphs against a plain loop over sessions, and how long training waits for data.

```sh
python -m benchmarks.reader
```

Single-threaded and measured in CPU seconds: the figures are for one core. Both sides of a comparison take turns.
"""

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.commands import language_model, prepare_synthetic, run_module, training_lines
from benchmarks.harness import Side, Spread, benchmark_parser, rate_table, ratio, set_threads, take_turns, write_report
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.errors import UserError

if TYPE_CHECKING:
    from llmgr_rec.data.catalog import Catalog
    from llmgr_rec.data.reader import SessionReader

READ, PLAIN_READ = "Parquet to offsets and values", "Parquet to lists"
BATCH, BARE_BATCH, PLAIN_BATCH = "batches", "batches without side features", "batches by loops"
TARGETS = {READ: 2_000_000, BATCH: 700_000}
# Work per round of the plain loops, which are some tens of times slower.
_PLAIN_GROUPS, _PLAIN_BATCHES = 2, 4


@dataclass(frozen=True)
class Settings:
    """Size of the data.

    Args:
        sessions: Rows of the split.
        items: Size of the catalog.
        mean_length: Mean clicks per row.
        batch_size: Sessions of a batch.
    """

    sessions: int
    items: int
    mean_length: float
    batch_size: int


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and measures."""
    parser = benchmark_parser("reader", "Compares reader and session graphs with a plain loop over sessions.")
    parser.add_argument("--sessions", type=int, default=400_000, help="Rows of the split.")
    parser.add_argument("--items", type=int, default=50_000, help="Size of the catalog.")
    parser.add_argument("--mean_length", type=float, default=9.0, help="Mean clicks per row.")
    parser.add_argument("--batch_size", type=int, default=2048, help="Sessions of a batch.")
    parser.add_argument(
        "--steps", type=int, default=100, help="Training steps per stage; 0 skips the measurement of waiting."
    )
    args = parse_args(parser, argv).as_dict()
    settings = Settings(args["sessions"], args["items"], args["mean_length"], args["batch_size"])
    if not 1 <= settings.batch_size <= settings.sessions:
        raise UserError(f"--batch_size is {settings.batch_size}; it must lie between 1 and --sessions")
    set_threads(1)
    with tempfile.TemporaryDirectory(prefix="llmgr-reader-") as folder:
        results = compare(Path(folder), settings, args["rounds"])
        if args["steps"]:
            results["waiting"] = waiting_shares(Path(folder), args["steps"])
    print(table(results))
    write_report(args["output"], args, results)


def compare(folder: Path, settings: Settings, rounds: int) -> dict[str, Any]:
    """Sessions per second of each side, and the ratios between them.

    Raises:
        RuntimeError: The two sides build different graphs.
    """
    from benchmarks import plain_graphs
    from benchmarks.planted_split import write_split
    from llmgr_rec.data.row_groups import RowGroups

    parts, catalog = write_split(
        folder / "split" / "train", settings.sessions, settings.items, settings.mean_length, seed=0
    )
    groups = RowGroups(parts, num_items=settings.items, by_click=False)
    rows, _ = plain_graphs.read_rows(parts, _PLAIN_GROUPS)
    random.Random(0).shuffle(rows)
    size = min(settings.batch_size, len(rows))
    plain_batches = cycle([rows[start : start + size] for start in range(0, len(rows) - size + 1, size)])

    def read() -> float:
        return sum(groups[number].items.num_rows for number in range(len(groups)))

    def read_plainly() -> float:
        return len(plain_graphs.read_rows(parts, _PLAIN_GROUPS)[0])

    def build_plainly() -> float:
        return sum(plain_graphs.build(next(plain_batches)).nodes_BM.shape[0] for _ in range(_PLAIN_BATCHES))

    readers = {name: _decoded_reader(parts, catalog, settings.batch_size, sides) for name, sides in _SIDES.items()}
    check_graphs(readers[BATCH], batches=2)
    sides = [Side(READ, read), Side(PLAIN_READ, read_plainly), Side(PLAIN_BATCH, build_plainly)]
    sides += [Side(name, partial(_walk, reader)) for name, reader in readers.items()]
    rates = take_turns(sides, rounds, clock=time.process_time)
    return {
        "sessions_per_s": rate_table(rates),
        "ratio": {
            READ: asdict(ratio(rates, READ, PLAIN_READ)),
            BATCH: asdict(ratio(rates, BATCH, PLAIN_BATCH)),
            BARE_BATCH: asdict(ratio(rates, BARE_BATCH, PLAIN_BATCH)),
        },
    }


_SIDES: dict[str, tuple[str, ...]] = {BATCH: ("category", "brand"), BARE_BATCH: ()}


def _decoded_reader(
    parts: list[Path], catalog: "Catalog", batch_size: int, sides: Sequence[str]
) -> "SessionReader[Any]":
    """A reader whose row groups are in memory, so that only the making of batches is measured."""
    from llmgr_rec.data.collate import Collator
    from llmgr_rec.data.reader import SamplingOrder, SessionReader
    from llmgr_rec.data.row_groups import RowGroups

    collate = Collator(catalog, sides)
    reader = SessionReader(
        parts, num_items=catalog.num_items, collate=collate, order=SamplingOrder(batch_size, shuffle=True)
    )
    reader.groups = RowGroups(parts, num_items=catalog.num_items, by_click=False, max_cached=len(reader.groups))
    for number in range(len(reader.groups)):
        reader.groups[number]
    return reader


def _walk(reader: "SessionReader[Any]") -> float:
    return sum(reader.collated(0, step).targets_B.numel() for step in range(reader.steps_per_epoch))


def check_graphs(reader: "SessionReader[Any]", batches: int) -> None:
    """Compares the graphs of some batches with those of the plain loop.

    Raises:
        RuntimeError: They differ.
    """
    from benchmarks import plain_graphs

    for step in range(min(batches, reader.steps_per_epoch)):
        raw = reader.raw(0, step)
        offsets = raw.offsets_B1.tolist()
        clicks = raw.items_L.tolist()
        plain = plain_graphs.build([clicks[start:end] for start, end in pairwise(offsets)])
        fast = plain_graphs.fast_contents(reader.collated(0, step).graph)
        for row, (ours, theirs) in enumerate(zip(fast, plain_graphs.plain_contents(plain), strict=True)):
            if ours != theirs:
                raise RuntimeError(f"batch {step}, session {row}: the graphs differ: {ours} and {theirs}")


def waiting_shares(folder: Path, steps: int, sessions: int = 4000, items: int = 5000) -> dict[str, Any]:
    """Share of the time that a training run waits for its next batch, over the windows of its log.

    Args:
        folder: Folder for data and run.
        steps: Training steps per stage.
        sessions: Sessions of the data set.
        items: Size of its catalog.
    """
    dataset, run = prepare_synthetic(folder, sessions, items), folder / "run"
    model = language_model()
    words = ["--config", "quickstart", "--dataset", str(dataset), "--output", str(run), "--llm.name_or_path", model]
    words += ["--blend.neighbors", "[]", "--runtime.eval_every", "0"]
    for stage in ("sbr", "align", "behave"):
        words += [f"--{stage}.max_steps", str(steps)]
    run_module("llmgr_rec.train", words)
    shares: dict[str, list[float]] = {}
    for line in training_lines(run):
        shares.setdefault(line["stage"], []).append(line["data_wait"])
    return {"language_model": model, "stages": {stage: asdict(Spread.of(values)) for stage, values in shares.items()}}


def table(results: dict[str, Any]) -> str:
    """The results as text."""
    lines = ["", f"{'':34}{'sessions/s per core':>42}   target"]
    for name, values in results["sessions_per_s"].items():
        target = f"{TARGETS[name]:,}" if name in TARGETS else ""
        lines.append(f"{name:34}{Spread(**values)!s:>42}   {target}")
    lines += [f"{name}: {Spread(**values)} times the plain loop" for name, values in results["ratio"].items()]
    if waiting := results.get("waiting"):
        lines += ["", f"share of training time spent waiting for data ({waiting['language_model']}), target < 0.02"]
        lines += [f"{stage:34}{Spread(**values)!s:>42}" for stage, values in waiting["stages"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
