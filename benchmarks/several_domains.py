"""Several domains: each alone against all together, and a domain of which nothing was trained, by its texts.

    python -m benchmarks.several_domains --interactions beauty=F,films=G --items beauty=F2,films=G2 --work runs

Trains the recipe `default` on each log alone, on all together, and on all but one; the last is extended by the items
of the domain that is left out, and ranks them with and without its neighbor scores. The control is the same with the
random initial weights. All rank the test sessions of a domain among its items. Gains are paired over sessions.
What is in the work folder is not made again, and a training that was stopped goes on, so that the command can be
repeated.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.harness import benchmark_parser, write_report
from benchmarks.work_folder import open_work
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.comma_separated import split_numbers
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.preparation.domain_inputs import paths_by_domain
from llmgr_rec.data.preparation.pipeline import prepare_dataset
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.data.schema import DOMAIN, MANIFEST_NAME
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.evaluate import main as evaluate
from llmgr_rec.evaluation.exclusion import rule_of_bundles
from llmgr_rec.evaluation.intervals import VALUES_P, count_pairs, count_ranks, mean_intervals, paired_gains
from llmgr_rec.evaluation.protocol import Measures, evaluate_model
from llmgr_rec.evaluation.rank_collector import RankCollector
from llmgr_rec.evaluation.session_ranks import RANK_PREFIX, Sessions, ranks_path, write_ranks
from llmgr_rec.extend import main as extend
from llmgr_rec.paths import LocalPath
from llmgr_rec.storage.bundle import load_bundle
from llmgr_rec.storage.bundle_index import read_index
from llmgr_rec.train import main as train

Ranks = NDArray[np.uint8]
TOGETHER = "together"
_BASELINES = ("popularity", "item_knn", "text_knn")
_METRIC = "ndcg@20"
# Options that determine the data sets and the runs of a seed.
_OPTIONS = ("interactions", "items", "settings")
# Settings of a run that keeps its initial weights; smoothing and blend are selected.
_RANDOM = ("--sbr.epochs", "0")
NO_NEIGHBORS = "without neighbors"
_GAINS = (
    (TOGETHER, "alone"),
    ("transferred", "text_knn"),
    ("transferred", "random"),
    (f"transferred {NO_NEIGHBORS}", "text_knn"),
    (f"transferred {NO_NEIGHBORS}", f"random {NO_NEIGHBORS}"),
    (f"transferred {NO_NEIGHBORS}", "popularity"),
    ("random", "text_knn"),
)


class Work:
    """Data sets and runs in a folder.

    Args:
        folder: The folder; what is in it is used again.
        interactions: Log of each domain.
        items: Items of each domain.
        settings: Options of `train`.
    """

    def __init__(self, folder: Path, interactions: dict[str, str], items: dict[str, str], settings: list[str]) -> None:
        self._folder, self._interactions, self._items, self._settings = folder, interactions, items, settings

    def dataset(self, name: str, domains: Sequence[str], alone: bool = False) -> Path:
        """The data set of some domains; alone, that of the log of one without its name."""
        folder = self._folder / "data" / name
        if not (folder / MANIFEST_NAME).is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            clicks, items = (
                files[domains[0]] if alone else ",".join(f"{one}={files[one]}" for one in domains)
                for files in (self._interactions, self._items)
            )
            # The same clicks and the same rule for repeats, alone and together.
            prepare_dataset(PrepareSettings(str(folder), clicks, items=items, min_interactions=1, repeats="exclude"))
        return folder

    def run(self, name: str, dataset: Path, seed: int, more: Sequence[str] = ()) -> Path:
        """A run, trained with the settings of all runs and some more."""
        run = self._folder / f"{name}-{seed}"
        if not (run / "export" / "sbr" / "bundle.json").is_file():
            words = ["--dataset", str(dataset), "--output", str(run), "--seed", str(seed), "--runtime.device", "cpu"]
            train([*words, *(["--resume"] if run.is_dir() else []), *self._settings, *more])
        return run

    def extended(self, run: Path, dataset: Path) -> Path:
        """The run for the items of a data set, without training."""
        output = run.with_name(f"{run.name}-extended")
        if not output.is_dir():
            extend(["--run", str(run), "--items", str(dataset / "items.parquet"), "--output", str(output)])
        return output

    def ranks(self, run: Path, dataset: Path, models: Sequence[str] = ("sbr",)) -> dict[str, dict[str, Ranks]]:
        """Target ranks of the test sessions by model and domain; the domain "" is a log alone."""
        output = run.with_name(f"{run.name}.json")
        if not output.is_file():
            evaluate(
                ["--run", str(run), "--dataset", str(dataset), "--output", str(output), "--models", ",".join(models)]
            )
        return _by_domain(ranks_path(output), models)

    def ranks_without_neighbors(self, run: Path, dataset: Path) -> dict[str, Ranks]:
        """Target ranks of the test sessions by the model alone, without its blend, by domain."""
        file = run.with_name(f"{run.name}-without-neighbors.ranks.parquet")
        if not file.is_file():
            world, sessions, collector = World.alone(), Dataset(dataset), RankCollector()
            bundle = replace(load_bundle(run, world), blend=None)
            rule = rule_of_bundles({"sbr": read_index(bundle.path)}, sessions.manifest)
            counts_V = bundle.catalog.train_count_V
            ranking = bundle.ranking(bundle.evaluation_batch_size)
            evaluate_model(ranking, sessions, "test", world, counts_V, rule, Measures(ranks=collector))
            found = Sessions.of(sessions, "test", bundle.catalog, rule)
            write_ranks(file, {"sbr": collector.gather(world)}, found)
        return _by_domain(file, ("sbr",))["sbr"]


def _by_domain(file: Path, models: Sequence[str]) -> dict[str, dict[str, Ranks]]:
    table = pq.read_table(file)
    columns = {model: table[f"{RANK_PREFIX}{model}"].to_numpy() for model in models}
    if DOMAIN not in table.column_names:
        return {model: {"": ranks_S} for model, ranks_S in columns.items()}
    names = np.array(table[DOMAIN].to_pylist())
    return {model: {name: ranks_S[names == name] for name in np.unique(names)} for model, ranks_S in columns.items()}


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark, prints the table and writes the results."""
    parser = benchmark_parser(
        "several_domains",
        "Compares a model of several domains with one of each.",
        "--interactions a=a.parquet,b=b.parquet --items a=a-items.parquet,b=b-items.parquet --work runs",
    )
    parser.add_argument("--interactions", type=str, required=True, help="As for llmgr_rec.prepare, by domain.")
    parser.add_argument("--items", type=str, required=True, help="As for llmgr_rec.prepare, by domain.")
    parser.add_argument("--work", type=LocalPath, required=True, help="Folder of data sets and runs, which are kept.")
    parser.add_argument("--seeds", type=str, default="0", help="Seeds, separated by commas.")
    parser.add_argument("--settings", type=str, default="", help="Options of llmgr_rec.train, separated by spaces.")
    args = parse_args(parser, argv).as_dict()
    interactions, items = (paths_by_domain(args[name], name) for name in ("interactions", "items"))
    if len(interactions) < 2 or set(items) != set(interactions):
        raise UserError("name two or more domains in --interactions, and the same in --items")
    folder = open_work(Path(args["work"]), {name: args[name] for name in _OPTIONS})
    threads = ["--runtime.threads_per_rank", str(args["threads"])]
    work = Work(folder, interactions, items, [*threads, *args["settings"].split()])
    rows = []
    for seed in split_numbers(args["seeds"], "--seeds", "0,1"):
        for row in compare(work, list(interactions), seed):
            rows.append(row)
            print(json.dumps(row), flush=True)
    write_report(args["output"], args, {"rows": rows})


def compare(work: Work, names: list[str], seed: int) -> list[dict[str, Any]]:
    """The results of each domain with one seed.

    Args:
        work: Data sets and runs.
        names: The domains.
        seed: Seed of the trainings.
    """
    joint = work.dataset(TOGETHER, names)
    together = work.ranks(work.run(TOGETHER, joint, seed), joint, ("sbr", *_BASELINES))
    rows = []
    for name in names:
        dataset = work.dataset(name, [name], alone=True)
        alone = work.ranks(work.run(name, dataset, seed), dataset)["sbr"][""]
        found = {"alone": alone, TOGETHER: together["sbr"][name]}
        found |= {model: together[model][name] for model in _BASELINES}
        found |= transferred(work, names, name, seed)
        row: dict[str, Any] = {"domain": name, "seed": seed, "sessions": len(alone)}
        row |= {model: with_interval(ranks_S) for model, ranks_S in found.items()}
        for model, other in _GAINS:
            row[f"gain of {model} over {other}"] = gain(found[model], found[other])
        rows.append(row)
    return rows


def transferred(work: Work, names: list[str], name: str, seed: int) -> dict[str, Ranks]:
    """Target ranks of the test sessions of a domain by models of the others, extended by its items.

    Args:
        work: Data sets and runs.
        names: All domains.
        name: The domain.
        seed: Seed of the trainings.

    Returns:
        Of a trained and of a random model, each with and without its neighbor scores.
    """
    joint = work.dataset(TOGETHER, names)
    without = work.dataset(f"without-{name}", [other for other in names if other != name])
    found = {}
    for model, prefix, more in (("transferred", "", ()), ("random", "random-", _RANDOM)):
        run = work.extended(work.run(f"{prefix}without-{name}", without, seed, more), joint)
        found[model] = work.ranks(run, joint)["sbr"][name]
        found[f"{model} {NO_NEIGHBORS}"] = work.ranks_without_neighbors(run, joint)[name]
    return found


def with_interval(ranks_S: Ranks) -> list[float]:
    """NDCG@20 and its 95 % interval over sessions."""
    counts_P = count_ranks(ranks_S)
    mean = float(counts_P @ VALUES_P[_METRIC]) / max(len(ranks_S), 1)
    return [round(one, 4) for one in (mean, *mean_intervals(counts_P)[_METRIC])]


def gain(ranks_S: Ranks, other_S: Ranks) -> list[float] | None:
    """Relative gain in NDCG@20 and its paired 95 % interval; None where there are too few hits."""
    found = paired_gains(count_pairs(ranks_S, other_S))[_METRIC]
    return None if found is None else [round(one, 4) for one in (found.mean, found.low, found.high)]


if __name__ == "__main__":
    run_cli(main)
