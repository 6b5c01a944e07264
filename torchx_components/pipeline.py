"""`python -m torchx_components.pipeline`: runs all steps from logs to report in sequence.

    python -m torchx_components.pipeline --output runs/demo
    python -m torchx_components.pipeline --data FOLDER --output runs/shop --config quickstart -- --llm.num_layers 6

Each command is printed before it runs, so that it can be repeated by hand. A step whose result exists is skipped, and
an interrupted step is resumed or repeated, so the same command continues where the last one stopped. TorchX has no
runner for sequential steps: all roles of an application start at once.
"""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmgr_rec.bounds import Bounds, check_options
from llmgr_rec.cli import make_parser, parse_args, run_cli
from llmgr_rec.config import trained_stages
from llmgr_rec.errors import StopRequested, UserError
from llmgr_rec.evaluation.results import blend_notes, format_table, read_metrics
from llmgr_rec.files import atomic_write, require_writable
from llmgr_rec.parent_process import end_with_parent
from llmgr_rec.paths import LocalPath
from llmgr_rec.train import parse_arguments

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

INPUT_FILES = ("interactions.parquet", "items.parquet")
STOP_TIMEOUT_S = 60


@dataclass(frozen=True)
class Step:
    """A command, and the file that marks it as complete.

    Args:
        name: Name of the step.
        command: Program and arguments.
        result: File that exists if and only if the step is complete, because each step renames its finished result.
    """

    name: str
    command: list[str]
    result: Path


def plan_steps(
    data: Path | None, output: Path, config: str, ranks: int, train_arguments: Sequence[str] = ()
) -> list[Step]:
    """All steps of a pipeline, in order.

    Args:
        data: Folder with interactions.parquet and items.parquet; None uses MovieLens-100K.
        output: Folder for all results.
        config: Recipe name or YAML file for training.
        ranks: Number of training processes on this machine.
        train_arguments: Further arguments of llmgr_rec.train.

    Raises:
        UserError: A setting or a training argument is invalid.
    """
    arguments, settings = parse_arguments(["--config", config, *train_arguments])
    if arguments.output or arguments.dataset:
        raise UserError("--output and --dataset of the trainer are set by this command; remove them after --")
    last_stage = trained_stages(settings)[-1] if arguments.stage == "all" else arguments.stage
    dataset, run, metrics = output / "dataset", output / "run", output / "run" / "metrics.json"
    steps = []
    if data is None:
        data = output / "raw"
        steps.append(Step("data", _module("datagen.movielens", "--output", data), data / INPUT_FILES[1]))
    inputs = [word for name in INPUT_FILES for word in (f"--{Path(name).stem}", data / name)]
    steps += [
        Step("prepare", _module("llmgr_rec.prepare", *inputs, "--output", dataset), dataset / "manifest.json"),
        Step(
            "train",
            _train_command(dataset, run, config, ranks, train_arguments),
            run / "export" / last_stage / "bundle.json",
        ),
        Step(
            "evaluate", _module("llmgr_rec.evaluate", "--run", run, "--dataset", dataset, "--output", metrics), metrics
        ),
        Step(
            "score",
            _module("llmgr_rec.score", "--run", run, "--input", dataset / "test", "--output", output / "scores"),
            output / "scores" / "_SUCCESS",
        ),
        Step(
            "report",
            _module(
                "llmgr_rec.report",
                *("--run", run, "--dataset", dataset, "--scores", output / "scores"),
                *("--output", output / "report"),
            ),
            output / "report" / "index.html",
        ),
    ]
    return steps


def _module(name: str, *arguments: str | Path) -> list[str]:
    return ["python", "-m", name, *map(str, arguments)]


def _train_command(dataset: Path, run: Path, config: str, ranks: int, more: Sequence[str]) -> list[str]:
    launch = ["torchx", "run", "-s", "local_cwd", "dist.ddp", "-j", f"1x{ranks}", "-m", "llmgr_rec.train", "--"]
    arguments = ["--config", config, "--dataset", str(dataset), "--output", str(run), *more]
    started = run.is_dir() and any(run.iterdir())
    return [*launch, *arguments, *(["--resume"] if started else [])]


def run_steps(steps: Sequence[Step], run: Callable[[Sequence[str]], int]) -> None:
    """Runs the steps that have no result yet.

    Args:
        steps: All steps in order.
        run: Function that runs a command and returns its exit code.

    Raises:
        UserError: A step failed.
    """
    for number, step in enumerate(steps, start=1):
        title = f"[{number}/{len(steps)}] {step.name}"
        if step.result.exists():
            print(f"{title}: already done ({step.result})", flush=True)
            continue
        print(f"{title}\n  $ {shlex.join(step.command)}", flush=True)
        start = time.monotonic()
        code = run(step.command)
        if code != 0 or not step.result.exists():
            failure = f"failed with exit code {code}" if code else f"did not write {step.result}"
            raise UserError(
                f"step {step.name} {failure}; see its messages above, run the same command again to continue"
            )
        print(f"  {step.name} took {time.monotonic() - start:.0f} s", flush=True)


def run_command(command: Sequence[str], environment: dict[str, str]) -> int:
    """Runs a command and returns its exit code.

    If this process is interrupted, the command is terminated first; if it is killed, the command is terminated, too.
    """
    try:
        # SIGTERM, because torchx then stops the processes that it has started.
        child = subprocess.Popen(command, env=environment, preexec_fn=lambda: end_with_parent(signal.SIGTERM))
    except FileNotFoundError:
        raise UserError(f"program {command[0]} is not installed; run python -m llmgr_rec.doctor") from None
    try:
        return child.wait()
    except (KeyboardInterrupt, StopRequested):
        child.terminate()
        try:
            child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
        raise


def child_environment(ranks: int) -> dict[str, str]:
    """Environment variables of the steps: program path, threads per rank, terminal for progress bars."""
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.stderr.isatty():
        # TorchX redirects stdout and stderr of its children to files, so progress bars need the terminal.
        environment.setdefault("LLMGR_TERMINAL", os.ttyname(sys.stderr.fileno()))
    return environment


def claim_output(output: Path, settings: dict[str, str]) -> None:
    """Creates the folder, or checks that its content was made with the same settings.

    Args:
        output: Folder for all results.
        settings: Data and settings of this run, by name.

    Raises:
        UserError: The folder has other content, or was made from other data or settings.
    """
    note = output / "pipeline.json"
    if note.is_file():
        before = json.loads(note.read_text())
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            name = changed[0]
            raise UserError(
                f"{output} was made with {name} {before.get(name)}, not {settings[name]}; "
                "give another folder (make demo RUN=...), or delete this one"
            )
        return
    require_writable(output, "RUN")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} exists and was not made by this command; give another folder (make demo RUN=...)")
    with atomic_write(note) as partial:
        partial.write_text(json.dumps(settings, indent=1))


def _check_input(data: Path | None) -> None:
    for name in INPUT_FILES if data else ():
        assert data is not None
        if not (data / name).is_file():
            raise UserError(f"{data / name} does not exist; DATA must be a folder with {' and '.join(INPUT_FILES)}")


def _identify_config(config: str) -> str:
    """The name of a recipe; for a file also its hash, because it may be edited between two calls."""
    return f"{config} ({_fingerprint(Path(config))})" if Path(config).is_file() else config


def _fingerprint(*files: Path) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _parser() -> "ArgumentParser":
    """Parser of the command line before `--`; arguments after it go to the trainer."""
    parser = make_parser(
        "torchx_components.pipeline",
        "Runs data, prepare, train, evaluate, score and report. Arguments after -- go to the trainer.",
        "--data FOLDER --output runs/shop --config quickstart -- --llm.num_layers 6",
    )
    parser.add_argument(
        "--data", type=LocalPath, help="folder with interactions.parquet and items.parquet; default: MovieLens-100K"
    )
    parser.add_argument("--output", type=LocalPath, required=True, help="folder for all results")
    parser.add_argument("--config", type=LocalPath, default="quickstart", help="recipe name or YAML file")
    parser.add_argument("--ranks", type=int, default=2, help="number of training processes")
    return parser


def main(argv: Sequence[str]) -> None:
    """Runs the missing steps and prints the metrics.

    Raises:
        UserError: The input or a setting is invalid, or a step failed.
    """
    words = list(argv)
    separator = words.index("--") if "--" in words else len(words)
    arguments = parse_args(_parser(), words[:separator])
    train_arguments = words[separator + 1 :]
    check_options({"ranks": arguments.ranks}, {"ranks": Bounds(at_least=1, at_most=1024)})
    data = Path(arguments.data) if arguments.data else None
    output = Path(arguments.output)
    _check_input(data)
    settings = {
        "data": f"{data.resolve()} ({_fingerprint(*(data / name for name in INPUT_FILES))})"
        if data
        else "MovieLens-100K",
        "config": _identify_config(arguments.config),
        "training arguments": shlex.join(train_arguments) or "none",
    }
    steps = plan_steps(data, output, arguments.config, arguments.ranks, train_arguments)
    claim_output(output, settings)
    environment = child_environment(arguments.ranks)
    run_steps(steps, lambda command: run_command(command, environment))
    metrics = read_metrics(output / "run" / "metrics.json")
    print("", format_table(metrics["test"]), *blend_notes(metrics.get("blends", {})), sep="\n")
    print(f"({metrics['count']:,} test sessions, {metrics['protocol']})\n")
    for label, path in (("report", "report/index.html"), ("scores", "scores/"), ("trained run", "run/")):
        print(f"{label + ':':<13}{output / path}")


if __name__ == "__main__":
    run_cli(main)
