"""A log that grows by day: training from yesterday's run against training anew, and new items without training.

    python -m benchmarks.growing_catalog --interactions F --items F --seeds 0,1,2

Cuts the clicks by time into slices. Day d has the clicks of the first d slices and the items that were clicked in them.
The sessions that end last are the test. From the second day on, it trains anew, anew for as few epochs as a warm start,
and from the run of the day before; and it extends the run of the day before by the items of the day, and ranks the test
sessions whose target is a new item. Seconds are those of the CPU. With --work, the command goes on where it was
stopped.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.harness import benchmark_parser, write_report
from benchmarks.work_folder import open_work, timed
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.comma_separated import split_numbers
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.preparation.pipeline import prepare_dataset
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.data.schema import MANIFEST_NAME
from llmgr_rec.errors import UserError
from llmgr_rec.evaluate import main as evaluate
from llmgr_rec.evaluation.intervals import count_pairs, count_ranks, mean_intervals, paired_gains
from llmgr_rec.evaluation.protocol import identity, split_reader
from llmgr_rec.evaluation.session_ranks import RANK_PREFIX, ranks_path
from llmgr_rec.extend import main as extend
from llmgr_rec.paths import LocalPath
from llmgr_rec.train import main as train

_READ_ROWS = 8192
# Options that determine the data sets and runs of a seed.
_OPTIONS = ("interactions", "items", "days", "epochs", "warm_epochs", "dim")
_COLD_MODELS = ("sbr", "text_knn", "popularity")
# First share of the clicks; the others are cut into slices of equal size.
_FIRST_DAY = 0.4
# Settings that make the recipe `default` light: one pass and sampled softmax.
_LIGHT = ("--encoder.one_pass", "true", "--loss.full_softmax_max_items", "1000")


@dataclass(frozen=True)
class Day:
    """The data of a day.

    Args:
        number: From 1 on.
        dataset: Prepared sessions.
        targets_S: Id of the target of each test session.
    """

    number: int
    dataset: Dataset
    targets_S: pa.Array


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark, prints the tables and writes the results."""
    parser = benchmark_parser(
        "growing_catalog",
        "Compares training from yesterday's run with training anew, day by day.",
        "--interactions interactions.parquet --items items.parquet",
    )
    parser.add_argument("--interactions", type=LocalPath, required=True, help="As for llmgr_rec.prepare.")
    parser.add_argument("--items", type=LocalPath, required=True, help="As for llmgr_rec.prepare.")
    parser.add_argument("--days", type=int, default=4, help="Number of days, 2 or more.")
    parser.add_argument("--seeds", type=str, default="0", help="Seeds, separated by commas.")
    parser.add_argument("--epochs", type=int, default=5, help="Epochs of a training anew.")
    parser.add_argument("--warm_epochs", type=int, default=1, help="Epochs of a training from yesterday's run.")
    parser.add_argument("--dim", type=int, default=32, help="Columns of the item tables.")
    parser.add_argument(
        "--work",
        type=LocalPath | None,
        default=None,
        help="Folder that keeps data sets and runs, so that the same command goes on where it was stopped.",
    )
    args = parse_args(parser, argv).as_dict()
    if args["days"] < 2:
        raise UserError(f"--days is {args['days']}; give 2 or more")
    seeds = split_numbers(args["seeds"], "--seeds", "0,1,2")
    kept = args["work"] and open_work(Path(args["work"]), {name: args[name] for name in _OPTIONS})
    with nullcontext(kept) if kept else TemporaryDirectory(prefix="llmgr-growing-") as folder:
        days = cut(Path(args["interactions"]), Path(args["items"]), args["days"], Path(folder))
        rows = []
        for seed in seeds:
            for row in follow(days, seed, args, Path(folder)):
                rows.append(row)
                print(*(f"{name} {value}" for name, value in row.items()), sep="  ", flush=True)
    write_report(args["output"], args, {"rows": rows})


def cut(interactions: Path, items: Path, number: int, folder: Path) -> list[Day]:
    """Prepares the data of each day.

    Args:
        interactions: The log.
        items: Its items.
        number: Number of days.
        folder: Folder to write to.
    """
    log, catalog = pq.read_table(interactions), pq.read_table(items)
    times = np.sort(log["timestamp"].cast(pa.int64()).to_numpy())
    days = []
    for day in range(1, number + 1):
        share = _FIRST_DAY + (1 - _FIRST_DAY) * (day - 1) / (number - 1)
        last = times[max(int(share * len(times)) - 1, 0)]
        clicks = log.filter(pc.less_equal(log["timestamp"].cast(pa.int64()), int(last)))
        clicked = catalog.filter(pc.is_in(catalog["item_id"], value_set=clicks["item_id"].combine_chunks().unique()))
        raw = folder / f"raw-{day}"
        raw.mkdir(exist_ok=True)
        pq.write_table(clicks, raw / "interactions.parquet")
        pq.write_table(clicked, raw / "items.parquet")
        dataset = prepare(raw, folder / f"dataset-{day}")
        targets = [raw.targets_B.numpy() for raw in split_reader(dataset, "test", _READ_ROWS, identity).batches(0)]
        days.append(Day(day, dataset, Catalog.of(dataset).item_ids.take(pa.array(np.concatenate(targets)))))
    return days


def prepare(raw: Path, folder: Path) -> Dataset:
    """Prepares a day; items that only test sessions have stay in the catalog."""
    if not (folder / MANIFEST_NAME).is_file():
        prepare_dataset(
            PrepareSettings(
                interactions=str(raw / "interactions.parquet"),
                items=str(raw / "items.parquet"),
                output=str(folder),
                min_interactions=0,
                min_session_length=2,
                split="temporal",
                keep_unseen_items=True,
            )
        )
    return Dataset(folder)


def follow(days: Sequence[Day], seed: int, args: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """Trains and evaluates every day with one seed.

    Args:
        days: The data of the days.
        seed: Seed of the trainings.
        args: Options of the benchmark.
        folder: Folder to write to.

    Yields:
        A row for each day after the first, and one with the gains over all of them.
    """
    of_days: dict[str, list[NDArray[np.uint8]]] = {}
    yesterday = folder / f"seed-{seed}-first"
    trained(days[0], yesterday, seed, args["epochs"], args)
    for before, day in pairwise(days):
        epochs = {"anew": args["epochs"], "short": args["warm_epochs"], "warm": args["warm_epochs"]}
        runs = {name: folder / f"seed-{seed}-{name}-{day.number}" for name in epochs}
        seconds = {
            name: trained(day, run, seed, epochs[name], args, yesterday if name == "warm" else None)
            for name, run in runs.items()
        }
        ranks = {name: evaluated(run, day, ("sbr",))["sbr"] for name, run in runs.items()}
        run = folder / f"seed-{seed}-extended-{day.number}"
        seconds["extended"] = extended(yesterday, day, run)
        cold = evaluated(run, day, _COLD_MODELS)
        valid = {f"validation {name}": validated(run) for name, run in runs.items()}
        yield {"seed": seed, "day": day.number, **valid, **summary(day, before, ranks, cold, seconds)}
        for name, ranks_S in ranks.items():
            of_days.setdefault(name, []).append(ranks_S)
        yesterday = runs["warm"]
    yield {"seed": seed, "day": "all", **gains({name: np.concatenate(found) for name, found in of_days.items()})}


def trained(day: Day, run: Path, seed: int, epochs: int, args: dict[str, Any], yesterday: Path | None = None) -> float:
    """Trains stage sbr; returns CPU seconds."""
    words = ["--dataset", str(day.dataset.path), "--output", str(run), "--seed", str(seed), "--sbr.epochs", str(epochs)]
    words += ["--config", "default", "--tables.dim", str(args["dim"]), *_LIGHT]
    words += ["--init_from", str(yesterday)] if yesterday else []
    words += ["--runtime.device", "cpu", "--runtime.threads_per_rank", str(args["threads"])]
    return timed(run, train, words)


def validated(run: Path) -> float:
    """NDCG@20 on the validation sessions, by which the blend was chosen."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return round(next(line["ndcg@20"] for line in lines if line.get("split") == "selection"), 4)


def extended(yesterday: Path, day: Day, run: Path) -> float:
    """Extends yesterday's run by the items of a day; returns CPU seconds."""
    words = ["--run", str(yesterday), "--items", str(day.dataset.items_path), "--output", str(run)]
    return timed(run, extend, words)


def evaluated(run: Path, day: Day, models: Sequence[str]) -> dict[str, NDArray[np.uint8]]:
    """Target ranks of the test sessions by model."""
    output = run.with_name(f"{run.name}.json")
    if not output.is_file():
        words = ["--run", str(run), "--dataset", str(day.dataset.path), "--output", str(output)]
        evaluate([*words, "--models", ",".join(models)])
    table = pq.read_table(ranks_path(output))
    return {model: table[f"{RANK_PREFIX}{model}"].to_numpy() for model in models}


def summary(
    day: Day,
    before: Day,
    ranks: dict[str, NDArray[np.uint8]],
    cold: dict[str, NDArray[np.uint8]],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Figures of a day: NDCG@20 with 95 % intervals, gains of the warm start, CPU seconds, and ranks of new items."""
    yesterday = Catalog.of(before.dataset)
    is_new_S = yesterday.index_of(day.targets_S) < 0
    row: dict[str, Any] = {
        "items": day.dataset.manifest.num_items,
        "new": int((yesterday.index_of(Catalog.of(day.dataset).item_ids) < 0).sum()),
        "sessions": len(is_new_S),
        "of_new_items": int(is_new_S.sum()),
    }
    for name, ranks_S in ranks.items():
        row[f"ndcg@20 {name}"] = ndcg(ranks_S)
    row |= gains(ranks)
    row |= {f"seconds {name}": round(value, 1) for name, value in seconds.items()}
    for name, ranks_S in {**cold, "warm": ranks["warm"]}.items():
        row[f"new items: ndcg@20 {'extended' if name == 'sbr' else name}"] = ndcg(ranks_S[is_new_S])
    return row


def gains(ranks: dict[str, NDArray[np.uint8]]) -> dict[str, list[float] | None]:
    """Relative gains in NDCG@20 with paired 95 % intervals over sessions; None where there are too few hits."""
    found = {}
    for name, other in (("warm", "anew"), ("warm", "short"), ("short", "anew")):
        gain = paired_gains(count_pairs(ranks[name], ranks[other]))["ndcg@20"]
        numbers = None if gain is None else [round(one, 4) for one in (gain.mean, gain.low, gain.high)]
        found[f"gain of {name} over {other}"] = numbers
    return found


def ndcg(ranks_S: NDArray[np.uint8]) -> list[float]:
    """NDCG@20 and its 95 % interval over sessions."""
    if not len(ranks_S):
        return []
    mean = np.where(ranks_S < 20, 1 / np.log2(ranks_S.astype(np.float64) + 2), 0).mean()
    return [round(float(one), 4) for one in (mean, *mean_intervals(count_ranks(ranks_S))["ndcg@20"])]


if __name__ == "__main__":
    run_cli(main)
