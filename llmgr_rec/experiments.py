"""`python -m llmgr_rec.experiments`: trains a matrix of variants and seeds, and writes one table with intervals.

```sh
python -m llmgr_rec.experiments --recipe backbones --dataset DATASET --output runs/backbones --seeds 0,1,2
```

An interrupted experiment goes on with the same command; nothing is trained twice, not even for another recipe in the
same output folder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llmgr_rec.cli import make_parser, parse_args, run_cli
from llmgr_rec.errors import UserError


def main(argv: Sequence[str]) -> None:
    """Parses arguments, checks the recipe, trains and judges what is missing and prints the table.

    Raises:
        UserError: Something in arguments, recipe or data set is wrong.
    """
    parser = make_parser("llmgr_rec.experiments", "Trains and compares the variants of an experiment.")
    parser.add_argument("--recipe", type=str, required=True, help="Shipped experiment, or a YAML file of that form.")
    parser.add_argument("--dataset", type=str, required=True, help="Folder made by llmgr_rec.prepare.")
    parser.add_argument("--output", type=str, required=True, help="Folder for runs, table and plots; kept and gone on.")
    parser.add_argument("--seeds", type=str, default="0,1,2", help="Seeds of every variant that is trained.")
    parser.add_argument(
        "--split", type=Literal["test", "valid"], default="test", help="Split judged; choose on valid, report on test."
    )
    parser.add_argument("--jobs", type=int, default=1, help="Processes that train and judge side by side.")
    arguments = parse_args(parser, argv)
    seeds = _numbers(arguments.seeds)

    from llmgr_rec.study.run import StudyRequest, run_study

    folders = Path(arguments.dataset), Path(arguments.output)
    request = StudyRequest(arguments.recipe, *folders, seeds, arguments.split, arguments.jobs)
    print(run_study(request))
    print(f"written: {request.file('md')}, .json and plots")


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.strip("[] ").split(",")]
    except ValueError:
        raise UserError(f"--seeds is {text}; give numbers with commas between them, such as 0,1,2") from None


if __name__ == "__main__":
    run_cli(main)
