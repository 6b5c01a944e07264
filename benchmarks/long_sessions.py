"""Compares data sets that differ in `prepare --long_sessions` only: the same variants, ranked on the same sessions.

```sh
python -m benchmarks.long_sessions --newest runs/ml/newest --split runs/ml/split --output runs/ml/long_sessions
```
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmgr_rec.cli import make_parser, parse_args, run_cli
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.errors import UserError
from llmgr_rec.experiments.compare import ndcg, relative_gain
from llmgr_rec.experiments.experiment import Experiment, Variant, load_experiment
from llmgr_rec.experiments.run_experiment import ExperimentRequest, run_experiment
from llmgr_rec.experiments.trial import TrialRunner
from llmgr_rec.paths import LocalPath

RULES = ("newest", "split")
_SPLIT = "valid"


def main(argv: Sequence[str]) -> None:
    """Command line."""
    parser = make_parser(
        "benchmarks.long_sessions",
        "Compares training rows of the newest clicks and of all clicks.",
        "--newest dataset-newest --split dataset-split --output runs/long-sessions",
    )
    for rule in RULES:
        text = f"Folder made by llmgr_rec.prepare --long_sessions {rule}."
        parser.add_argument(f"--{rule}", type=LocalPath, required=True, help=text)
    parser.add_argument("--output", type=LocalPath, required=True, help="Folder of trained models, which are reused.")
    parser.add_argument("--seeds", type=list[int], default=[0, 1], help="Seeds of each trained variant.")
    parser.add_argument("--experiment", type=str, default="long_sessions", help="Name or YAML file of the variants.")
    args = parse_args(parser, argv)
    datasets = {rule: Dataset(Path(args[rule])) for rule in RULES}
    require_same_sessions(datasets["newest"], datasets["split"])
    experiment = load_experiment(args.experiment)
    for rule, dataset in datasets.items():
        run_experiment(ExperimentRequest(args.experiment, dataset.path, Path(args.output) / rule, args.seeds, _SPLIT))
    runners = {rule: TrialRunner(Path(args.output) / rule, dataset, _SPLIT) for rule, dataset in datasets.items()}
    print(table(experiment, runners, args.seeds))


def require_same_sessions(newest: Dataset, split: Dataset) -> None:
    """Checks that two data sets have the same items and validation sessions.

    Raises:
        UserError: They differ in more than their training rows.
    """
    for dataset in (newest, split):
        if not dataset.manifest.num_sessions[_SPLIT]:
            raise UserError(f"{dataset.path} has no validation sessions; prepare it with another --split")
    files = [
        {name: entry.sha256 for name, entry in dataset.manifest.files.items() if name.startswith(f"{_SPLIT}/")}
        for dataset in (newest, split)
    ]
    if files[0] != files[1] or newest.manifest.catalog_hash != split.manifest.catalog_hash:
        raise UserError(
            f"{newest.path} and {split.path} have different items or validation sessions; prepare both from the same "
            "input by the same options, except for --long_sessions"
        )


def table(experiment: Experiment, runners: dict[str, TrialRunner], seeds: Sequence[int]) -> str:
    """NDCG@20 of each variant on both data sets in Markdown, with the gain of the second over the first.

    Args:
        experiment: The variants, of which all trials are on disk.
        runners: Trials of each data set, by the value of --long_sessions.
        seeds: Seeds of the trials.
    """
    sessions = {rule: runner.dataset.manifest.num_sessions for rule, runner in runners.items()}
    examples = {rule: runner.dataset.manifest.num_examples["train"] for rule, runner in runners.items()}
    lines = [
        f"{sessions['newest'][_SPLIT]:,} validation sessions, {len(seeds)} seeds. NDCG@20, its standard deviation over "
        "seeds, and the gain with the 95 % interval of a paired bootstrap over sessions.",
        "",
        "| variant | newest | split | gain |",
        "|---|---|---|---|",
        "| training rows | " + " | ".join(f"{sessions[rule]['train']:,}" for rule in RULES) + " | |",
        "| training targets | " + " | ".join(f"{examples[rule]:,}" for rule in RULES) + " | |",
    ]
    for variant in experiment.variants:
        values = {rule: _ndcg_of(experiment, variant, runner, seeds) for rule, runner in runners.items()}
        gain = relative_gain(values["split"], values["newest"])
        shown = f"{gain.mean:+.1%} [{gain.low:+.1%} .. {gain.high:+.1%}]" if gain else "none"
        lines.append(f"| {variant.name} | {' | '.join(_mean(values[rule]) for rule in RULES)} | {shown} |")
    return "\n".join(lines)


def _ndcg_of(experiment: Experiment, variant: Variant, runner: TrialRunner, seeds: Sequence[int]) -> list[np.ndarray]:
    """NDCG@20 of each session, one array per seed; a baseline has one."""
    trials = [runner.trial(experiment, variant, seed) for seed in (seeds if variant.trains else [0])]
    return [ndcg(trial.target_ranks_S) for trial in trials]


def _mean(values: Sequence[np.ndarray]) -> str:
    means = [float(values_S.mean()) for values_S in values]
    deviation = f" ± {np.std(means, ddof=1):.4f}" if len(means) > 1 else ""
    return f"{np.mean(means):.4f}{deviation}"


if __name__ == "__main__":
    run_cli(main)
