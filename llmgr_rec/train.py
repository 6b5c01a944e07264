"""`python -m llmgr_rec.train`: trains on a prepared data set, in one process or with torchrun or TorchX.

```sh
python -m llmgr_rec.train --dataset DATASET --output RUN
torchx run -s local_cwd dist.ddp -j 1x2 -m llmgr_rec.train -- --config quickstart --dataset DATASET --output RUN
```
"""

import argparse
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmgr_rec.cli import add_code_argument, make_parser, run_cli
from llmgr_rec.comma_separated import split_list
from llmgr_rec.config import Config, StageName
from llmgr_rec.config_file import add_config_arguments, load_config, parse_with_config, recipe_of
from llmgr_rec.errors import UserError
from llmgr_rec.first_and_last_line import print_result
from llmgr_rec.library_imports import command_imports
from llmgr_rec.paths import StoragePath, is_remote, url_problem
from llmgr_rec.registry import require_allowed
from llmgr_rec.remote_path import RemotePath, as_path

if TYPE_CHECKING:
    from jsonargparse import Namespace

# Recipe of a command without options: trains all stages in minutes.
BARE_RECIPE = "quickstart"


def main(argv: Sequence[str]) -> None:
    """Parses arguments, runs the preflight, then trains.

    Args:
        argv: Arguments of the command.

    Raises:
        UserError: An argument, a setting, the data set or the run folder is not usable; raised on every rank before the
            process group starts.
    """
    arguments, config = parse_arguments(argv)
    if arguments.resume and not (arguments.output or _launch()):
        raise UserError("--resume requires a run folder; give it with --output")

    with command_imports():
        from llmgr_rec.training.preflight import RunRequest
        from llmgr_rec.training.train_run import train_run

    output = as_path(arguments.output or _default_output())
    resume = arguments.resume or _is_restarted(output)
    stages = train_run(
        RunRequest(
            config=config,
            dataset=_dataset(arguments, output, resume),
            output=output,
            stage=arguments.stage,
            resume=resume,
            launch=_launch(),
            recipe=_recipe(arguments, output),
            init_from=as_path(arguments.init_from) if arguments.init_from else None,
        )
    )
    trained = ", ".join(stages) or "nothing, because all stages of the run are already complete with its settings"
    print_result("train", f"trained {trained}", output)


def _dataset(arguments: "Namespace", output: Path, resume: bool) -> Path:
    """The data set to train on: as given, that of the run that is resumed, or synthetic sessions.

    Raises:
        UserError: It is needed and not given.
    """
    from llmgr_rec.storage.run_facts import dataset_of_run

    if arguments.dataset:
        return as_path(arguments.dataset)
    if resume and (output / "config.yaml").exists():
        if recorded := dataset_of_run(output):
            return recorded
        raise UserError(f"{output} does not say which data set it is trained on; give it with --dataset")
    if arguments.resume:
        raise UserError(f"there is no run in {output} to resume; give another --output, or --dataset to start a run")
    if arguments.init_from:
        raise UserError("--init_from requires the data set to go on with; give it with --dataset")
    return _synthetic_dataset()


def _recipe(arguments: "Namespace", output: Path) -> str:
    """Name of the recipe or settings file; empty for a run that is resumed, or that takes the settings of another."""
    files = [Path(str(file)) for file in arguments.config or []]
    runs = [output, *([as_path(arguments.init_from)] if arguments.init_from else [])]
    return "" if any(_settings_file(run) in files for run in runs) else recipe_of(files)


def _settings_file(run: Path) -> Path:
    """The settings of a run; a copy on this machine, with which the parser was called, if the run is remote."""
    file = run / "config.yaml"
    return file.local() if isinstance(file, RemotePath) and file.is_file() else file


def parse_arguments(argv: Sequence[str]) -> "tuple[Namespace, Config]":
    """Parses the arguments of the command and all settings.

    Args:
        argv: Arguments of the command.

    Raises:
        UserError: An argument or setting is unknown, of the wrong type or out of its range.
    """
    parser = make_parser("llmgr_rec.train")
    parser.add_argument(
        "--dataset",
        type=StoragePath,
        help="Folder written by llmgr_rec.prepare; default: that of the run that "
        "is resumed, or small synthetic sessions.",
    )
    parser.add_argument(
        "--output",
        type=StoragePath,
        help="Run folder; default: runs/ID with the run id of the launcher, or train-TIME.",
    )
    parser.add_argument("--stage", type=Literal["all", StageName], default="all", help="Stage to train.")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Continue an interrupted run exactly where it stopped, with the settings of the run.",
    )
    parser.add_argument(
        "--init_from",
        type=StoragePath,
        help="Run to start from instead of random weights, whose items may differ; its settings are used without "
        "--config.",
    )
    add_code_argument(parser)
    add_config_arguments(parser)
    return parse_with_config(parser, _with_default_config(argv))


def _with_default_config(argv: Sequence[str]) -> list[str]:
    """Adds --config if absent: the settings of the run that is resumed or started from, or `BARE_RECIPE`.

    `BARE_RECIPE` is for a command without options.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # The real parser reports a missing value.
    parser.add_argument("--config", nargs="?", const="")
    parser.add_argument("--output", nargs="?", default="", const="")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--init_from", nargs="?", default="", const="")
    parser.add_argument("--allow_code", nargs="?", default="", const="")
    given, _ = parser.parse_known_args(argv)
    if given.config is not None:
        return list(argv)
    # The real parser reports a URL that is not one.
    runs = [
        run
        for run in (given.output if given.resume else "", given.init_from)
        if not (is_remote(run) and url_problem(run))
    ]
    for run_config in (as_path(run) / "config.yaml" for run in runs if run):
        if run_config.is_file():
            _check_settings_of_run(run_config, argv, split_list(given.allow_code))
            return ["--config", str(run_config), *argv]
    if not any(word.startswith("--") for word in argv):
        return ["--config", BARE_RECIPE, *argv]
    return list(argv)


def _check_settings_of_run(run_config: Path, argv: Sequence[str], allow_code: Sequence[str]) -> None:
    """Checks that the settings can be read, and that they import only what is allowed or named on the command line."""
    try:
        config = load_config(run_config)
    except UserError as error:
        raise UserError(
            f"cannot go on with the settings of the run: {error}; if another version of llmgr_rec wrote them, use that "
            "version, or give --config and another --output"
        ) from None
    names = {"encoder.name": config.encoder.name, "head.name": config.head.name}
    names |= {f"blend.neighbors[{place}]": name for place, name in enumerate(config.blend.neighbors)}
    given = re.split(r"[\s\[\],='\"]+", " ".join(argv))
    asked = {setting: name for setting, name in names.items() if name not in given}
    require_allowed(asked, allow_code, str(run_config))


def _launch() -> str:
    """Run id of torchrun, the same on all ranks and after restarts; empty without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if run_id == "none" else run_id


def _is_restarted(output: Path) -> bool:
    """Whether the launcher has restarted this run, which then resumes without --resume."""
    from llmgr_rec.training.train_run import LAUNCH

    file = output / LAUNCH
    return bool(_launch()) and file.is_file() and file.read_text() == _launch()


def _default_output() -> str:
    if not _launch() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The clocks of the ranks may differ, and so would the names.
        raise UserError("several ranks were started without a run id, so give --output; or start them with torchrun")
    return f"runs/{_launch() or time.strftime('train-%Y%m%d-%H%M%S')}"


def _synthetic_dataset() -> Path:
    """Generates small synthetic sessions once; a file lock makes the other ranks wait."""
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
