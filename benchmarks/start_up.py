"""Start-up time of the commands: of their help, to their first batch, and to the first step of the quickstart.

```sh
python -m benchmarks.start_up
```
"""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.commands import language_model, prepare_arguments, run_module
from benchmarks.harness import Spread, benchmark_parser, write_report
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.errors import UserError
from llmgr_rec.paths import LocalPath

COMMANDS = ("score", "prepare", "train", "evaluate", "report", "plan")
MOST_HELP_S, MOST_FIRST_STEP_S, MOST_FIRST_BATCH_S = 1.0, 20.0, 3.5
# What is measured to its first batch of sessions.
READERS = ("evaluate", "score", "report", "recommend")
# Ends the process where it would rank its first batch.
_FIRST_BATCH = """
import importlib, os, sys
from llmgr_rec.library_imports import collector_paused
with collector_paused():
    from llmgr_rec.distributed.ranking import CatalogRanker
CatalogRanker.rank = CatalogRanker.target_ranks = lambda *_, **__: os._exit(0)
name, run, dataset, output = sys.argv[1:]
if name == "recommend":
    from llmgr_rec import Recommender
    recommender = Recommender.load(run)
    recommender.recommend([recommender.item_ids[:2].to_pylist()])
words = {
    "evaluate": ["--models", "sbr", "--dataset", dataset, "--output", f"{output}.json"],
    "score": ["--input", f"{dataset}/test", "--output", output],
    "report": ["--dataset", dataset, "--output", output],
}
importlib.import_module(f"llmgr_rec.{name}").main(["--run", run, *words[name]])
"""
_POLL_S = 0.01
_TIMEOUT_S = 600.0


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and measures."""
    parser = benchmark_parser("start_up", "Measures the start-up time of the commands.")
    parser.add_argument("--dataset", type=LocalPath, help="Prepared data set to train on; by default MovieLens-100K.")
    parser.add_argument("--run", type=LocalPath, help="Run of the default recipe on it; by default, one of a step.")
    args = parse_args(parser, argv).as_dict()
    if args["rounds"] < 1:
        raise UserError(f"--rounds is {args['rounds']}; set it to 1 or more")
    # In turns, so that a change of the machine's speed affects all commands.
    seconds: dict[str, list[float]] = {command: [] for command in COMMANDS}
    for _ in range(args["rounds"]):
        for command, values in seconds.items():
            values.append(help_seconds(command))
    results: dict[str, Any] = {"help_s": {name: asdict(Spread.of(values)) for name, values in seconds.items()}}
    results["language_model"] = language_model()
    with tempfile.TemporaryDirectory(prefix="llmgr-start-") as folder:
        dataset = Path(args["dataset"]) if args["dataset"] else movielens(Path(folder))
        run = Path(args["run"]) if args["run"] else default_run(dataset, Path(folder) / "default")
        batches: dict[str, list[tuple[float, float]]] = {name: [] for name in READERS}
        for number in range(args["rounds"]):
            for name, costs in batches.items():
                costs.append(first_batch_seconds(name, run, dataset, Path(folder) / f"{name}{number}"))
        first = [first_step_seconds(dataset, Path(folder) / f"run{number}") for number in range(args["rounds"])]
    results["first_step_s"] = asdict(Spread.of(first))
    results["first_batch_s"] = {name: asdict(Spread.of([wall for wall, _ in costs])) for name, costs in batches.items()}
    results["first_batch_cpu_s"] = {name: min(cpu for _, cpu in costs) for name, costs in batches.items()}
    print(table(results))
    write_report(args["output"], args, results)


def help_seconds(command: str) -> float:
    """Seconds of `--help` of a command."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", f"llmgr_rec.{command}", "--help"], check=True, capture_output=True)
    return time.perf_counter() - started


def movielens(folder: Path) -> Path:
    """Prepares MovieLens-100K as the quickstart does."""
    run_module("datagen.movielens", ["--output", str(folder / "raw")])
    run_module("llmgr_rec.prepare", prepare_arguments(folder))
    return folder / "dataset"


def default_run(dataset: Path, run: Path) -> Path:
    """Trains the default recipe for a step."""
    run_module("llmgr_rec.train", ["--dataset", str(dataset), "--output", str(run), "--sbr.max_steps", "1"])
    return run


def first_batch_seconds(name: str, run: Path, dataset: Path, output: Path) -> tuple[float, float]:
    """Seconds from the start of a process to its first batch of sessions, and those of its processor time.

    Args:
        name: One of `READERS`; `recommend` is `Recommender.recommend`.
        run: A trained run.
        dataset: The data set of the run.
        output: Path that does not exist.
    """
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    words = [sys.executable, "-c", _FIRST_BATCH, name, str(run), str(dataset), str(output)]
    subprocess.run(words, check=True, capture_output=True, timeout=_TIMEOUT_S)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def first_step_seconds(dataset: Path, run: Path) -> float:
    """Seconds from the start of a quickstart training process to the log line of its first step.

    Raises:
        UserError: The training ended, or ran into the time limit, without a step.
    """
    words = ["--config", "quickstart", "--dataset", str(dataset), "--output", str(run)]
    words += ["--llm.name_or_path", language_model(), "--runtime.log_every", "1", "--sbr.max_steps", "2"]
    log = run / "metrics.jsonl"
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "llmgr_rec.train", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while not (log.is_file() and log.stat().st_size):
                if process.poll() is not None:
                    output = process.stderr.read().strip() if process.stderr else ""
                    raise UserError(
                        f"training ended before its first step: {output.splitlines()[-1:] or process.returncode}"
                    )
                if time.perf_counter() - started > _TIMEOUT_S:
                    raise UserError(f"no training step within {_TIMEOUT_S:.0f} s")
                time.sleep(_POLL_S)
            return time.perf_counter() - started
        finally:
            process.kill()


def table(results: dict[str, Any]) -> str:
    """The results as text."""
    lines = ["", f"{'':46}{'seconds':>28}   target"]
    for command, values in results["help_s"].items():
        lines.append(f"{f'python -m llmgr_rec.{command} --help':46}{Spread(**values)!s:>28}   {MOST_HELP_S:g}")
    for name, values in results["first_batch_s"].items():
        label = f"start of {name} to first batch ({results['first_batch_cpu_s'][name]:.2f} s of CPU)"
        lines.append(f"{label:46}{Spread(**values)!s:>28}   {MOST_FIRST_BATCH_S:g}")
    first = Spread(**results["first_step_s"])
    lines.append(f"{'start of quickstart training to first step':46}{first!s:>28}   {MOST_FIRST_STEP_S:g}")
    worst = max(values["median"] for values in results["help_s"].values())
    lines.append(f"slowest help {worst:.2f} s; language model: {results['language_model']}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
