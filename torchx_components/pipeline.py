"""`python -m torchx_components.pipeline`: the whole way from logs to report, one documented command after the other.

    python -m torchx_components.pipeline --output runs/demo
    python -m torchx_components.pipeline --data FOLDER --output runs/shop --config quickstart -- --llm.num_layers 6

Every command is printed before it runs, so that each can be repeated by hand. A step whose result is there is skipped,
an interrupted one is continued or repeated: the same command goes on where the last one stopped. TorchX itself has no
runner for steps that follow each other; roles of one application start together.
"""

import argparse
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

from llmgr_rec.cli import run_cli
from llmgr_rec.config import trained_stages
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.results import format_table, prior_notes, read_metrics
from llmgr_rec.files import atomic_write, require_writable
from llmgr_rec.train import parse_arguments

INPUT_FILES = ("interactions.parquet", "items.parquet")
STOP_TIMEOUT_S = 60


@dataclass(frozen=True)
class Step:
    """One command and the file that proves that it ended well.

    Args:
        name: What the step is called.
        command: Program and arguments.
        product: Exists exactly when the step is complete, because every step renames its finished result into place.
    """

    name: str
    command: list[str]
    product: Path


def plan_steps(
    data: Path | None, output: Path, config: str, ranks: int, train_arguments: Sequence[str] = ()
) -> list[Step]:
    """All steps of a pipeline, in order.

    Args:
        data: Folder with interactions.parquet and items.parquet; None takes MovieLens-100K.
        output: Folder for everything that is made.
        config: Recipe name or YAML file of the training.
        ranks: Training processes on this machine.
        train_arguments: Further arguments of the trainer.

    Raises:
        UserError: A setting or an argument of the trainer is wrong.
    """
    arguments, settings = parse_arguments(["--config", config, *train_arguments])
    if arguments.output or arguments.dataset:
        raise UserError("--output and --dataset of the trainer are this command's to give; leave them out after --")
    last_stage = trained_stages(settings)[-1] if arguments.stage == "all" else arguments.stage
    dataset, run, metrics = output / "dataset", output / "run", output / "run" / "metrics.json"
    shown = ("--dataset", dataset, "--scores", output / "scores")
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
            _module("llmgr_rec.report", "--run", run, *shown, "--output", output / "report"),
            output / "report" / "index.html",
        ),
    ]
    return steps


def _module(name: str, *arguments: str | Path) -> list[str]:
    return ["python", "-m", name, *map(str, arguments)]


def _train_command(dataset: Path, run: Path, config: str, ranks: int, further: Sequence[str]) -> list[str]:
    launch = ["torchx", "run", "-s", "local_cwd", "dist.ddp", "-j", f"1x{ranks}", "-m", "llmgr_rec.train", "--"]
    arguments = ["--config", config, "--dataset", str(dataset), "--output", str(run), *further]
    started = run.is_dir() and any(run.iterdir())
    return [*launch, *arguments, *(["--resume"] if started else [])]


def run_steps(steps: Sequence[Step], run: Callable[[Sequence[str]], int]) -> None:
    """Runs the steps that have no result yet.

    Args:
        steps: All steps in order.
        run: Runs one command and returns its exit code.

    Raises:
        UserError: A step failed.
    """
    for number, step in enumerate(steps, start=1):
        title = f"[{number}/{len(steps)}] {step.name}"
        if step.product.exists():
            print(f"{title}: done already ({step.product})", flush=True)
            continue
        print(f"{title}\n  $ {shlex.join(step.command)}", flush=True)
        start = time.monotonic()
        code = run(step.command)
        if code != 0 or not step.product.exists():
            why = f"ended with code {code}" if code else f"left no {step.product}"
            raise UserError(f"step {step.name} {why}; its messages stand above, the same command goes on from here")
        print(f"  {step.name} took {time.monotonic() - start:.0f} s", flush=True)


def run_command(command: Sequence[str], environment: dict[str, str]) -> int:
    """Runs a command to its end; when this process is told to stop, the command is, too, and has time to tidy up."""
    try:
        child = subprocess.Popen(command, env=environment)
    except FileNotFoundError:
        raise UserError(f"program {command[0]} is not installed; python -m llmgr_rec.doctor tells the remedy") from None
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.terminate()
        try:
            child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
        raise


def child_environment(ranks: int) -> dict[str, str]:
    """Environment of the steps: this interpreter's programs first, cores shared out, the terminal for progress bars."""
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.stderr.isatty():
        # TorchX gives its children files for stdout and stderr; with this, their progress bars still reach the user.
        environment.setdefault("LLMGR_TERMINAL", os.ttyname(sys.stderr.fileno()))
    return environment


def claim_output(output: Path, settings: dict[str, str]) -> None:
    """Makes the folder, or checks that what it holds was made with the same settings.

    Raises:
        UserError: The folder is something else, or was made from other data or settings.
    """
    note = output / "pipeline.json"
    if note.is_file():
        before = json.loads(note.read_text())
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            name = changed[0]
            raise UserError(
                f"{output} was made with {name} {before.get(name)}, not {settings[name]}; "
                "name another folder (make demo RUN=...), or delete this one"
            )
        return
    require_writable(output, "RUN")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} exists and was not made by this command; name another folder (make demo RUN=...)")
    with atomic_write(note) as partial:
        partial.write_text(json.dumps(settings, indent=1))


def _check_input(data: Path | None) -> None:
    for name in INPUT_FILES if data else ():
        assert data is not None
        if not (data / name).is_file():
            raise UserError(f"{data / name} does not exist; DATA is a folder with {' and '.join(INPUT_FILES)}")


def _told_apart(config: str) -> str:
    """A recipe's name; of a file also what it says, which may be edited between two calls."""
    return f"{config} ({_fingerprint(Path(config))})" if Path(config).is_file() else config


def _fingerprint(*files: Path) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def make_argument_parser() -> argparse.ArgumentParser:
    """Arguments of the pipeline; what follows `--` goes to the trainer."""
    parser = argparse.ArgumentParser(
        "python -m torchx_components.pipeline",
        description="Runs data, prepare, train, evaluate, score and report. Arguments after -- go to the trainer.",
    )
    parser.add_argument(
        "--data", default="", help="folder with interactions.parquet and items.parquet; default MovieLens-100K"
    )
    parser.add_argument("--output", required=True, help="folder for everything that is made")
    parser.add_argument("--config", default="quickstart", help="recipe name or YAML file")
    parser.add_argument("--ranks", type=int, default=2, help="training processes")
    return parser


def main(argv: Sequence[str]) -> None:
    """Runs what is missing and prints the table.

    Raises:
        UserError: Input, settings or a step are wrong.
    """
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    arguments = make_argument_parser().parse_args(words[:cut])
    further = words[cut + 1 :]
    if arguments.ranks < 1:
        raise UserError(f"--ranks is {arguments.ranks}; give at least 1")
    data = Path(arguments.data) if arguments.data else None
    output = Path(arguments.output)
    _check_input(data)
    settings = {
        "data": f"{data.resolve()} ({_fingerprint(*(data / name for name in INPUT_FILES))})"
        if data
        else "MovieLens-100K",
        "config": _told_apart(arguments.config),
        "training arguments": shlex.join(further) or "none",
    }
    steps = plan_steps(data, output, arguments.config, arguments.ranks, further)
    claim_output(output, settings)
    signal.signal(signal.SIGTERM, _stop)
    environment = child_environment(arguments.ranks)
    run_steps(steps, lambda command: run_command(command, environment))
    metrics = read_metrics(output / "run" / "metrics.json")
    print("", format_table(metrics["test"]), *prior_notes(metrics.get("priors", {})), sep="\n")
    print(f"({metrics['count']:,} test sessions, {metrics['protocol']})\n")
    for what, where in (("report", "report/index.html"), ("scores", "scores/"), ("trained run", "run/")):
        print(f"{what + ':':<13}{output / where}")


if __name__ == "__main__":
    run_cli(main)
