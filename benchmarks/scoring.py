"""Offline scoring from Parquet to Parquet against the straightforward implementation: sessions per second, same lists.

```sh
python -m benchmarks.scoring
```
"""

import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import Side, Spread, benchmark_parser, rate_table, ratio, set_threads, take_turns, write_report
from benchmarks.language_setup import add_language_arguments, open_dataset
from benchmarks.plain_scoring import score_plainly
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.paths import LocalPath
from llmgr_rec.scoring.score_run import ScoreRequest, score_run

OURS, PLAIN = "llmgr_rec", "straightforward"
K = 20
MAX_LENGTH = 50
# Items whose relative scores are closer than this may be swapped: both sides add the same numbers in another order.
TOLERANCE = 1e-5


def main(argv: Sequence[str]) -> None:
    """Command line."""
    parser = benchmark_parser("scoring", "Compares offline scoring with the straightforward implementation.")
    add_language_arguments(parser)
    parser.add_argument("--run", type=LocalPath, help="Run folder made by llmgr_rec.train; default: one is trained.")
    parser.add_argument("--sessions", type=int, default=4000, help="Sessions scored per round.")
    args = parse_args(parser, argv)
    threads = set_threads(args.threads)
    logging.getLogger("llmgr_rec").setLevel(logging.ERROR)
    with TemporaryDirectory() as folder:
        work = Path(folder)
        dataset = open_dataset(args.dataset, folder)
        run = Path(args.run) if args.run else _train(dataset, work / "run", args)
        source = _input(dataset, args.sessions, work / "input.parquet")
        ours, plain = work / "ours", work / "plain.parquet"

        def score() -> float:
            shutil.rmtree(ours, ignore_errors=True)
            options = {"max_length": MAX_LENGTH, "batch_size": args.batch_size, "repeats": "allow"}
            request = ScoreRequest(run, source, ours, K, **options)
            return float(score_run(request).rows_in)

        def score_straightforwardly() -> float:
            return float(score_plainly(run / "export" / "behave", source, plain, K, args.batch_size, MAX_LENGTH))

        sides = [Side(OURS, score), Side(PLAIN, score_straightforwardly)]
        rates = take_turns(sides, args.rounds, warm_up=0)
        same = compare(pq.read_table(ours), pq.read_table(plain))
    gain = ratio(rates, OURS, PLAIN)
    print(f"scoring: {gain} times the sessions per second, {threads} threads")
    for side, values in rates.items():
        print(f"  {side:16} {Spread.of(values)} sessions/s, including the loading of the model")
    print(
        f"  relative scores differ by at most {same['score']:.1e}; {same['same_lists']} of {same['lists']} lists are "
        f"equal,\n  {same['same_but_ties']} are equal except for items whose scores differ by less than {TOLERANCE:g}"
    )
    results = {"sessions_per_s": rate_table(rates), "ratio": asdict(gain), "agreement": same}
    write_report(args.output, args.as_dict(), results)


def compare(ours: pa.Table, plain: pa.Table) -> dict[str, float]:
    """Compares two outputs.

    Args:
        ours: One row per session.
        plain: The same sessions in the same order.

    Returns:
        score: Largest difference of scores at the same rank, relative to the largest score.
        lists: Number of lists.
        same_lists: Number of lists with the same items in the same order.
        same_but_ties: Number of lists that are the same except for ties.
    """
    if ours["session_id"].to_pylist() != plain["session_id"].to_pylist():
        raise ValueError("the two outputs hold different sessions")
    scores = [np.array(table["scores"].to_pylist()) for table in (ours, plain)]
    largest = float(np.abs(scores[1]).max())
    same = ties = 0
    for mine, other, values in zip(
        ours["item_ids"].to_pylist(), plain["item_ids"].to_pylist(), scores[1] / largest, strict=True
    ):
        same += mine == other
        ties += _same_but_ties(mine, other, values)
    return {
        "score": float(np.abs(scores[0] - scores[1]).max()) / largest,
        "lists": len(ours),
        "same_lists": same,
        "same_but_ties": ties,
    }


def _same_but_ties(mine: list[Any], other: list[Any], values: np.ndarray) -> bool:
    """Whether the score at each item's rank in one list is within the tolerance of that at its rank in the other."""
    ranks = {item: rank for rank, item in enumerate(other)}
    moved = [(rank, ranks.get(item, len(other) - 1)) for rank, item in enumerate(mine) if item != other[rank]]
    return all(abs(values[here] - values[there]) < TOLERANCE for here, there in moved)


def _input(dataset: Dataset, sessions: int, path: Path) -> Path:
    """The first test sessions as one file."""
    table = pa.concat_tables([pq.read_table(part) for part in dataset.parts("test")]).slice(0, sessions)
    pq.write_table(table.select(["session_id", "items"]), path)
    return path


def _train(dataset: Dataset, run: Path, args: Any) -> Path:
    """Trains a run of a few steps; its speed does not depend on the weights."""
    settings = {
        "config": "quickstart",
        "dataset": dataset.path,
        "output": run,
        "llm.name_or_path": args.llm,
        "llm.num_layers": args.num_layers,
        "llm.dtype": args.dtype,
        "prompt.templates": args.templates,
        # Encoding the texts of the items takes minutes and is not compared.
        "head.item_text": "false",
        "blend.neighbors": "[]",
        "sbr.max_steps": 50,
        "align.epochs": 0,
        "behave.max_steps": 20,
        "runtime.eval_every": 0,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "-m", "llmgr_rec.train", *words], check=True, capture_output=True)
    return run


if __name__ == "__main__":
    run_cli(main)
