"""`python -m llmgr_rec.experiments`: trains variants of a model with several seeds and compares them in a table.

```sh
python -m llmgr_rec.experiments --experiment backbones --dataset DATASET --output runs/backbones --seeds 0,1,2
```

The same command resumes an interrupted experiment. Experiments in the same output folder share trained models.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llmgr_rec.cli import make_parser, parse_args, run_cli
from llmgr_rec.comma_separated import split_names, split_numbers
from llmgr_rec.evaluation.results import METRICS
from llmgr_rec.first_and_last_line import print_result
from llmgr_rec.library_imports import command_imports
from llmgr_rec.paths import LocalPath


def main(argv: Sequence[str]) -> None:
    """Parses arguments, checks the experiment, runs the missing trials and prints the table.

    Args:
        argv: Arguments of the command.

    Raises:
        UserError: An argument, the experiment or the data set is not usable.
    """
    parser = make_parser("llmgr_rec.experiments")
    parser.add_argument("--experiment", type=LocalPath, required=True, help="Shipped experiment, or a YAML file.")
    parser.add_argument("--dataset", type=LocalPath, required=True, help="Folder written by llmgr_rec.prepare.")
    parser.add_argument(
        "--output", type=LocalPath, required=True, help="Folder for runs, table and plots; existing runs are reused."
    )
    parser.add_argument("--seeds", type=str, default="0,1,2", help="Comma-separated seeds of each trained variant.")
    parser.add_argument(
        "--split",
        type=Literal["test", "valid"],
        default="test",
        help="Split to evaluate; select on valid, report on test.",
    )
    parser.add_argument(
        "--metrics", type=str, default=",".join(METRICS), help="Comma-separated metrics of the tables: hr, ndcg, mrr."
    )
    parser.add_argument(
        "--cutoffs", type=str, default="20", help="Comma-separated cutoffs of the metrics of the tables, 1 to 255."
    )
    parser.add_argument("--jobs", type=int, default=1, help="Number of processes that run trials in parallel.")
    arguments = parse_args(parser, argv)
    seeds = split_numbers(arguments.seeds, "--seeds", "0,1,2")
    metrics = split_names(arguments.metrics, "--metrics", METRICS)
    cutoffs = split_numbers(arguments.cutoffs, "--cutoffs", "5,10,20")

    with command_imports():
        from llmgr_rec.experiments.run_experiment import ExperimentRequest, run_experiment

    folders = Path(arguments.dataset), Path(arguments.output)
    request = ExperimentRequest(
        arguments.experiment, *folders, seeds, arguments.split, arguments.jobs, metrics, cutoffs
    )
    print(run_experiment(request))
    wrote = f"{request.file('md')}, .csv, .tex, .json, target ranks and plots"
    print_result("experiments", f"seeds {arguments.seeds}, split {arguments.split}", wrote)


if __name__ == "__main__":
    run_cli(main)
