"""`python -m llmgr_rec.train`: trains on a prepared data set, alone or under torchrun / TorchX.

```sh
python -m llmgr_rec.train --dataset DATASET --output RUN
torchx run -s local_cwd dist.ddp -j 1x2 -m llmgr_rec.train -- --config quickstart --dataset DATASET --output RUN
```
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmgr_rec.cli import is_rank0, make_parser, run_cli
from llmgr_rec.config import Config, StageName
from llmgr_rec.config_file import add_config_arguments, parse_with_config
from llmgr_rec.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import Namespace

# Trains all stages in minutes where there is nothing but the bare command.
BARE_RECIPE = "quickstart"


def main(argv: Sequence[str]) -> None:
    """Parses arguments, runs the preflight, then trains.

    Raises:
        UserError: Something in arguments, data set, settings or run folder is wrong. It is raised on every rank before
            any rank waits for another.
    """
    arguments, config = parse_arguments(argv)
    if arguments.resume and not (arguments.output or _launch()):
        raise UserError("--resume has nothing to continue; name the run folder with --output")

    from llmgr_rec.training.preflight import RunRequest
    from llmgr_rec.training.train_run import train_run

    output = Path(arguments.output or _default_output())
    stages = train_run(
        RunRequest(
            config=config,
            dataset=Path(arguments.dataset) if arguments.dataset else _synthetic_dataset(),
            output=output,
            stage=arguments.stage,
            resume=arguments.resume or _is_restarted(output),
            launch=_launch(),
        )
    )
    if is_rank0():
        what = ", ".join(stages) or "nothing new, since all stages of the run are complete with its own settings"
        print(f"trained {what}; run folder {output}")


def parse_arguments(argv: Sequence[str]) -> "tuple[Namespace, Config]":
    """The command's arguments and all settings.

    Raises:
        UserError: An argument or setting is unknown, of the wrong type or out of its range.
    """
    parser = make_parser(
        "llmgr_rec.train", "Trains the session recommender and, with a recipe that has one, a language model on it."
    )
    parser.add_argument(
        "--dataset", type=str, help="Folder made by llmgr_rec.prepare; without it, small synthetic sessions are made."
    )
    parser.add_argument(
        "--output", type=str, help="Run folder to create; default runs/ID of the launch, or runs/train-TIME."
    )
    parser.add_argument("--stage", type=Literal["all", StageName], default="all", help="Stage to run.")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Continue an interrupted run exactly where it stopped, with its own settings.",
    )
    add_config_arguments(parser)
    return parse_with_config(parser, _with_default_config(argv))


def _with_default_config(argv: Sequence[str]) -> list[str]:
    """Without --config a resumed run keeps its own settings, and the bare command takes `BARE_RECIPE`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # The real parser reports a missing value.
    parser.add_argument("--config", nargs="?", const="")
    parser.add_argument("--output", nargs="?", default="", const="")
    parser.add_argument("--resume", action="store_true")
    given, _ = parser.parse_known_args(argv)
    if given.config is not None:
        return list(argv)
    own = Path(given.output, "config.yaml")
    if given.resume and given.output and own.is_file():
        return ["--config", str(own), *argv]
    if not any(word.startswith("--") for word in argv):
        return ["--config", BARE_RECIPE, *argv]
    return list(argv)


def _launch() -> str:
    """Name of the launch: torchrun gives all ranks, and all restarts of them, the same run id."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if run_id == "none" else run_id


def _is_restarted(output: Path) -> bool:
    """Whether the launcher has restarted this very run, which then goes on without being asked to."""
    from llmgr_rec.training.train_run import LAUNCH

    note = output / LAUNCH
    return bool(_launch()) and note.is_file() and note.read_text() == _launch()


def _default_output() -> str:
    if not _launch() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Each rank would name the folder by its own clock.
        raise UserError("several ranks were started without a run id, so give --output; or start them with torchrun")
    return f"runs/{_launch() or time.strftime('train-%Y%m%d-%H%M%S')}"


def _synthetic_dataset() -> Path:
    """Makes small synthetic sessions once, under a lock because every rank comes here."""
    from filelock import FileLock

    from datagen.synthetic import main as synthesize
    from llmgr_rec.prepare import main as prepare

    root = Path("runs/synthetic")
    root.mkdir(parents=True, exist_ok=True)
    dataset = root / "dataset"
    with FileLock(root / ".lock"):
        if not dataset.exists():
            if not (root / "raw").exists():
                synthesize(["--output", str(root / "raw")])
            files = [str(root / "raw" / f"{name}.parquet") for name in ("interactions", "items")]
            prepare(["--interactions", files[0], "--items", files[1], "--output", str(dataset)])
    return dataset


if __name__ == "__main__":
    run_cli(main)
