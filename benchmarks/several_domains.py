"""Several domains: each alone against all together, and a domain of which nothing was trained, by its texts.

    python -m benchmarks.several_domains --interactions beauty=F,films=G --items beauty=F2,films=G2 --work runs

Trains the recipe `default` on each log alone, on all together, and on all but one; the last is extended by the items
of the domain that is left out. All rank the test sessions of a domain among its items. Gains are paired over sessions.
What is in the work folder is not trained again, and a training that was killed goes on, so that the command can be
repeated.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.harness import benchmark_parser, write_report
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.comma_separated import split_numbers
from llmgr_rec.data.preparation.domain_inputs import paths_by_domain
from llmgr_rec.data.preparation.pipeline import prepare_dataset
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.data.schema import DOMAIN, MANIFEST_NAME
from llmgr_rec.errors import UserError
from llmgr_rec.evaluate import main as evaluate
from llmgr_rec.evaluation.intervals import VALUES_P, count_pairs, count_ranks, mean_intervals, paired_gains
from llmgr_rec.evaluation.session_ranks import RANK_PREFIX, ranks_path
from llmgr_rec.extend import main as extend
from llmgr_rec.paths import LocalPath
from llmgr_rec.train import main as train

Ranks = NDArray[np.uint8]
TOGETHER = "together"
_BASELINES = ("popularity", "item_knn", "text_knn")
_METRIC = "ndcg@20"


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

    def dataset(self, name: str, domains: Sequence[str]) -> Path:
        """The data set of some domains; of a single one, that of its log as it is."""
        folder = self._folder / "data" / name
        if not (folder / MANIFEST_NAME).is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            clicks, items = (
                files[domains[0]] if len(domains) == 1 else ",".join(f"{one}={files[one]}" for one in domains)
                for files in (self._interactions, self._items)
            )
            # The same clicks and the same rule for repeats, alone and together.
            prepare_dataset(PrepareSettings(str(folder), clicks, items=items, min_interactions=1, repeats="exclude"))
        return folder

    def run(self, name: str, dataset: Path, seed: int) -> Path:
        """A trained run."""
        run = self._folder / f"{name}-{seed}"
        if not (run / "export" / "sbr" / "bundle.json").is_file():
            words = ["--dataset", str(dataset), "--output", str(run), "--seed", str(seed), "--runtime.device", "cpu"]
            train([*words, *(["--resume"] if run.is_dir() else []), *self._settings])
        return run

    def extended(self, run: Path, dataset: Path) -> Path:
        """The run for the items of a data set, without training."""
        output = run.with_name(f"{run.name}-extended")
        if not output.is_dir():
            extend(["--run", str(run), "--items", str(dataset / "items.parquet"), "--output", str(output)])
        return output

    def ranks(self, run: Path, dataset: Path, models: Sequence[str] = ("sbr",)) -> dict[str, dict[str, Ranks]]:
        """Target ranks of the test sessions by model and domain; the domain "" is a log alone."""
        output = run.with_suffix(".json")
        if not output.is_file():
            evaluate(
                ["--run", str(run), "--dataset", str(dataset), "--output", str(output), "--models", ",".join(models)]
            )
        table = pq.read_table(ranks_path(output))
        columns = {model: table[f"{RANK_PREFIX}{model}"].to_numpy() for model in models}
        if DOMAIN not in table.column_names:
            return {model: {"": ranks_S} for model, ranks_S in columns.items()}
        names = np.array(table[DOMAIN].to_pylist())
        return {
            model: {name: ranks_S[names == name] for name in np.unique(names)} for model, ranks_S in columns.items()
        }


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
    work = Work(Path(args["work"]), interactions, items, args["settings"].split())
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
        alone_dataset = work.dataset(name, [name])
        alone = work.ranks(work.run(name, alone_dataset, seed), alone_dataset)["sbr"][""]
        others = [other for other in names if other != name]
        without = work.dataset(f"without-{name}", others)
        extended = work.extended(work.run(f"without-{name}", without, seed), joint)
        found = {
            "alone": alone,
            TOGETHER: together["sbr"][name],
            "untrained": work.ranks(extended, joint)["sbr"][name],
            **{model: together[model][name] for model in _BASELINES},
        }
        row: dict[str, Any] = {"domain": name, "seed": seed, "sessions": len(alone)}
        row |= {model: with_interval(ranks_S) for model, ranks_S in found.items()}
        row["gain of together over alone"] = gain(found[TOGETHER], alone)
        row["gain of untrained over text_knn"] = gain(found["untrained"], found["text_knn"])
        rows.append(row)
    return rows


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
