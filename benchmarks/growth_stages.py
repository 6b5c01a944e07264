"""Cost of every stage at one size of the data; each stage is a command in a process of its own."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.commands import prepare_arguments, run_module, training_lines
from benchmarks.planted_split import write_split

STAGES = ("prepare", "sbr", "align", "behave", "evaluate", "score")


@dataclass(frozen=True)
class Size:
    """One size of the data and of the launch.

    Args:
        sessions: Sessions.
        items: Items of the catalog.
        ranks: Processes.
    """

    sessions: int
    items: int
    ranks: int


@dataclass(frozen=True)
class Cost:
    """Cost of a stage at a size.

    Args:
        seconds: Of the whole command, including the start of the process.
        processor_s: Processor time of the command and its processes.
        step_ms: Milliseconds per training step; 0 if the command does not train.
        tree_mib: Largest sum of the resident sizes of all its processes; shared memory counts for each of them.
        process_mib: Largest resident size of one of them.
    """

    seconds: float
    processor_s: float
    step_ms: float
    tree_mib: float
    process_mib: float


def run_stages(
    folder: Path, size: Size, stages: Sequence[str], steps: int, threads: int, on_stage: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Runs stages at one size.

    Args:
        folder: Empty folder for data and runs.
        size: The size.
        stages: Some of `STAGES`, in their order, with those that they need.
        steps: Steps of each of the stages align and behave; stage sbr trains a whole epoch.
        threads: CPU threads of each rank; 0 divides the cores among the ranks.
        on_stage: Called with the name of each stage before it starts.

    Returns:
        Cost of each stage, as plain values.
    """
    words = ["--output", str(folder / "raw"), "--sessions", str(size.sessions), "--items", str(size.items)]
    run_module("datagen.synthetic", words)
    dataset, run = str(folder / "dataset"), folder / "run"
    train = ["--config", "quickstart", "--dataset", dataset, "--output", str(run), "--llm.name_or_path", "random-tiny"]
    train += ["--sbr.epochs", "1", "--runtime.eval_every", "0", "--runtime.log_every", "5"]
    train += ["--runtime.threads_per_rank", str(threads)]
    train += ["--blend.neighbors", "[]", "--align.max_steps", str(steps), "--behave.max_steps", str(steps)]
    commands = {
        "prepare": ("llmgr_rec.prepare", prepare_arguments(folder)),
        **{stage: ("llmgr_rec.train", [*train, "--stage", stage]) for stage in ("sbr", "align", "behave")},
        "evaluate": ("llmgr_rec.evaluate", ["--dataset", dataset, "--output", str(folder / "metrics.json")]),
        "score": ("llmgr_rec.score", ["--input", f"{dataset}/test", "--output", str(folder / "scores"), "--k", "20"]),
    }
    costs = {}
    for stage, (module, arguments) in commands.items():
        if stage not in stages:
            continue
        on_stage(stage)
        if stage in ("evaluate", "score"):
            arguments = ["--run_folder", str(run), *arguments]
        ran = run_module(module, arguments, 1 if stage == "prepare" else size.ranks)
        trained, steps_s = _training_time(run, stage) if module == "llmgr_rec.train" else (0, 0.0)
        step_ms = 1000 * steps_s / trained if trained else 0.0
        costs[stage] = asdict(Cost(ran.seconds, ran.processor_s, step_ms, ran.tree_mib, ran.process_mib))
    return costs


def _training_time(run: Path, stage: str) -> tuple[int, float]:
    """Steps of a stage and their seconds, summed over the windows of its log except the first.

    In the first window the model is traced and the pipeline filled, which does not depend on the size of the data.
    """
    first, last, seconds = 0, 0, 0.0
    batch_size = _batch_size(run, stage)
    for line in training_lines(run):
        if line["stage"] != stage:
            continue
        if first:
            seconds += (line["step"] - last) * batch_size / line["examples_per_s"]
        first, last = first or line["step"], line["step"]
    return last - first, seconds


def _batch_size(run: Path, stage: str) -> int:
    import yaml

    return int(yaml.safe_load((run / "config.yaml").read_text())[stage]["batch_size"])


def reader_memory(folder: Path, sessions: int, items: int) -> float:
    """MiB that reading a whole split of this many sessions adds to a process."""
    write_split(folder / "train", sessions, items, mean_length=9, seed=0)
    command = [sys.executable, "-m", "benchmarks.reader_memory", str(folder / "train"), str(items)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
