"""Offline scoring from Parquet to Parquet against the straightforward implementation: sessions per second, same lists.

```sh
python -m benchmarks.scoring
python -m benchmarks.scoring --rates --run RUN --dataset DATASET
```

With --rates: sessions per second and core of `score` and of `evaluate` for a session recommender, of `score` on two
ranks, and of a plain loop; and the memory of a large job.
"""

import json
import logging
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.commands import run_module
from benchmarks.harness import Side, Spread, benchmark_parser, rate_table, ratio, set_threads, take_turns, write_report
from benchmarks.language_setup import add_language_arguments, open_dataset
from benchmarks.plain_scoring import score_plainly, score_recommender_plainly
from llmgr_rec.baselines.builders import build_baseline
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.schema import ITEMS_NAME
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.protocol import evaluate_baseline, evaluate_model
from llmgr_rec.paths import LocalPath
from llmgr_rec.scoring.score_run import ScoreRequest, score_run
from llmgr_rec.storage.bundle import Bundle, load_bundle

OURS, PLAIN = "llmgr_rec", "straightforward"
K = 20
_ROW_GROUP = 1 << 17
_CPU = ", per processor second"
MAX_LENGTH = 50
# Items whose relative scores are closer than this may be swapped: both sides add the same numbers in another order.
TOLERANCE = 1e-5


def main(argv: Sequence[str]) -> None:
    """Command line."""
    parser = benchmark_parser("scoring", "Compares offline scoring with the straightforward implementation.")
    add_language_arguments(parser)
    parser.add_argument("--run", type=LocalPath, help="Run folder made by llmgr_rec.train; default: one is trained.")
    parser.add_argument("--sessions", type=int, default=4000, help="Sessions scored per round.")
    parser.add_argument("--rates", action="store_true", help="Measure a session recommender; needs --run, --dataset.")
    parser.add_argument("--memory_sessions", type=int, default=0, help="With --rates: sessions of a job for memory.")
    args = parse_args(parser, argv)
    if args.rates:
        if not (args.run and args.dataset):
            raise UserError("--rates measures a trained run; give --run and --dataset")
        results = rates_of_recommender(Path(args.run), Dataset(args.dataset), args.sessions, args.rounds)
        if args.memory_sessions:
            results["memory"] = memory_of_job(Path(args.run), Dataset(args.dataset), args.memory_sessions)
        print(json.dumps(results, indent=2))
        write_report(args.output, args.as_dict(), results)
        return
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


def rates_of_recommender(run: Path, dataset: Dataset, sessions: int, rounds: int) -> dict[str, Any]:
    """Sessions per second on one core, by ways to rank them; commands and the plain loop take turns.

    Args:
        run: A run of a session recommender.
        dataset: Its data set.
        sessions: Sessions of a job. The rate of a command is that of its sessions beyond a tenth of them, without the
            start; with the start it is that of the whole command.
        rounds: Rounds.
    """
    set_threads(1)
    bundle, more = load_bundle(run), sessions - sessions // 10
    with TemporaryDirectory() as folder:
        work = Path(folder)
        few, many = (write_sessions(dataset, count, work / f"{count}.parquet") for count in (sessions // 10, sessions))

        def seconds(source: Path, ranks: int) -> tuple[float, float]:
            """Elapsed seconds of a command, and processor seconds of all its ranks."""
            shutil.rmtree(work / "out", ignore_errors=True)
            words = ["--run_folder", str(run), "--input", str(source), "--output", str(work / "out"), "--threads", "1"]
            before = _seconds_of_children()
            elapsed = run_module("llmgr_rec.score", [*words, "--k", str(K), "--repeats", "allow"], ranks).seconds
            return elapsed, _seconds_of_children() - before

        rates: dict[str, list[float]] = {}
        for _ in range(rounds):
            for ranks in (1, 2):
                (short, short_cpu), (long, long_cpu) = seconds(few, ranks), seconds(many, ranks)
                rates.setdefault(f"score, {ranks} ranks, whole command", []).append(sessions / long)
                rates.setdefault(f"score, {ranks} ranks", []).append(more / (long - short))
                rates.setdefault(f"score, {ranks} ranks{_CPU}", []).append(more / (long_cpu - short_cpu))
            started = time.process_time()
            count = score_recommender_plainly(bundle, few, work / "plain.parquet", K, bundle.ranking().batch_size)
            rates.setdefault(f"plain loop{_CPU}", []).append(count / (time.process_time() - started))
            for name, rate in evaluation_rates(bundle, dataset).items():
                rates.setdefault(f"evaluate, {name}", []).append(rate)
    return {
        "sessions_per_s": {name: str(Spread.of(values)) for name, values in rates.items()},
        "two_ranks_to_one": str(ratio(rates, "score, 2 ranks", "score, 1 ranks")),
        "score_to_plain_loop": str(ratio(rates, f"score, 1 ranks{_CPU}", f"plain loop{_CPU}")),
    }


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def evaluation_rates(bundle: Bundle, dataset: Dataset) -> dict[str, float]:
    """Test sessions per processor second of the model, of baselines with and without building them, and together."""
    catalog, alone = bundle.catalog, World.alone()
    rates = {}
    started = time.process_time()
    ranking = bundle.ranking(bundle.evaluation_batch_size)
    count = evaluate_model(ranking, dataset, "test", alone, catalog.train_count_V)["count"]
    spent = [time.process_time() - started]
    rates["sbr"] = count / spent[0]
    for name in ("popularity", "item_knn", "text_knn"):
        started = time.process_time()
        baseline = build_baseline(name, dataset, catalog)
        built = time.process_time()
        evaluate_baseline(baseline, dataset, "test", catalog, alone)
        ended = time.process_time()
        rates[name], rates[f"{name}, built, too"] = count / (ended - built), count / (ended - started)
        spent.append(ended - built)
    rates["sbr, popularity and item_knn"] = count / sum(spent[:3])
    return rates


def memory_of_job(run: Path, dataset: Dataset, sessions: int) -> dict[str, float]:
    """Seconds and largest resident MiB of a job.

    Args:
        run: A run.
        dataset: Its data set.
        sessions: Sessions of the job.
    """
    with TemporaryDirectory() as folder:
        source = write_sessions(dataset, sessions, Path(folder) / "in.parquet")
        words = ["--run", str(run), "--input", str(source), "--output", f"{folder}/out", "--threads", "1"]
        cost = run_module("llmgr_rec.score", words)
    return {"sessions": sessions, "seconds": cost.seconds, "mib": cost.process_mib}


def write_sessions(dataset: Dataset, count: int, path: Path) -> Path:
    """Writes sessions of 1 to 12 raw ids: random stretches of the training sessions, shorter ones whole.

    Args:
        dataset: The data set.
        count: Sessions.
        path: File to write.
    """
    rng = np.random.default_rng(0)
    item_ids = pq.read_table(dataset.path / ITEMS_NAME, columns=["item_id"])["item_id"].combine_chunks()
    parts = [pq.read_table(part, columns=["items"]) for part in dataset.parts("train")]
    lists = pa.concat_tables(parts)["items"].combine_chunks()
    clicks, offsets = lists.flatten().to_numpy(), lists.offsets.to_numpy()
    schema = pa.schema([("session_id", pa.string()), ("items", pa.list_(item_ids.type))])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, count, _ROW_GROUP):
            size = min(_ROW_GROUP, count - first)
            chosen = rng.integers(0, len(lists), size)
            lengths = np.minimum(rng.integers(1, 13, size), np.diff(offsets)[chosen])
            room = np.diff(offsets)[chosen] - lengths
            starts = offsets[chosen] + (rng.random(size) * (room + 1)).astype(np.int64)
            ends = np.concatenate([[0], np.cumsum(lengths)])
            places = np.repeat(starts - ends[:-1], lengths) + np.arange(ends[-1])
            items = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), item_ids.take(pa.array(clicks[places])))
            names = pa.array([f"session-{number}" for number in range(first, first + size)])
            writer.write_table(pa.table([names, items], schema=schema))
    return path


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
