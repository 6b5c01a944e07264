"""`python -m llmgr_rec.experiments`: trains variants of a model with several seeds, and compares them in one table.

```sh
python -m llmgr_rec.experiments --experiment backbones --dataset DATASET --output runs/backbones --seeds 0,1,2
```

The same command resumes an interrupted experiment. Nothing is trained twice, also not for another experiment in the
same output folder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llmgr_rec.cli import make_parser, parse_args, run_cli
from llmgr_rec.errors import UserError


def main(argv: Sequence[str]) -> None:
    """Parses arguments, checks the experiment, runs the trials that are missing and prints the table.

    Raises:
        UserError: Something in arguments, experiment or data set is wrong.
    """
    parser = make_parser("llmgr_rec.experiments", "Trains and compares the variants of an experiment.")
    parser.add_argument("--experiment", type=str, required=True, help="Shipped experiment or path of a YAML file.")
    parser.add_argument("--dataset", type=str, required=True, help="Folder made by llmgr_rec.prepare.")
    parser.add_argument(
        "--output", type=str, required=True, help="Folder for runs, table and plots; what it holds is reused."
    )
    parser.add_argument("--seeds", type=str, default="0,1,2", help="Seeds of every variant that is trained.")
    parser.add_argument(
        "--split",
        type=Literal["test", "valid"],
        default="test",
        help="Split that is evaluated; select on valid, report on test.",
    )
    parser.add_argument("--jobs", type=int, default=1, help="Processes that run trials in parallel.")
    arguments = parse_args(parser, argv)
    seeds = _numbers(arguments.seeds)

    from llmgr_rec.experiments.run_experiment import ExperimentRequest, run_experiment

    folders = Path(arguments.dataset), Path(arguments.output)
    request = ExperimentRequest(arguments.experiment, *folders, seeds, arguments.split, arguments.jobs)
    print(run_experiment(request))
    print(f"written: {request.file('md')}, .json and plots")


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.strip("[] ").split(",")]
    except ValueError:
        raise UserError(f"--seeds is {text}; give numbers with commas between them, such as 0,1,2") from None


if __name__ == "__main__":
    run_cli(main)
