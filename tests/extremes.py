"""Every option of every command with extreme values: each call must give a result, or one line and exit code 2.

    python -m tests.extremes --output counts.jsonl [--commands llmgr_rec.train,llmgr_rec.score] [--share 0/2]

runs all options with all values for real on small data, each in a process of its own, and prints counts by command.
`tests/test_extremes.py` runs the part that needs no training.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from llmgr_rec.cli import run_cli
from llmgr_rec.config_file import save_config
from tests.commands import command_names, main_of, options_of, takes_path
from tests.datagen.dumps import json_lines, write
from tests.small_run import clean_up, config, small_run

# As words of the command line: numbers at and beyond their ends, what is no number, no value, other types, odd text.
VALUES = (
    "0", "-1", "1", "2", "1.5", "-0.0", "1e20", "-1e20", "1e400", "1000000000", "9223372036854775807", "9" * 40,
    "nan", ".nan", "inf", "-.inf", "", " ", "[]", "[1]", "[null]", "[title,title]", "{}", "{a: 1}", "null", "true",
    "x" * 5000, "é🙂", "a\udc80b", "a\0b", "a\nb", "\ufeff1", "[[[[", "'", "&x *x", "!!python/object:os.system x",
    "~no_such_user", "a?*[1]b", r"a\b$$(HOME)", "..",
)  # fmt: skip
# Any other text is a path, and a good one.
PATHS = (
    "", " ", "s3://b/c", "x" * 5000, "x" * 255, "é🙂", "a\udc80b", "a\0b", "a\nb", "[]", "'", "~no_such_user",
    "a?*[1]b", r"a\b$$(HOME)", "..", "/dev/null", "/dev/null/below", "/proc/self/mem",
)  # fmt: skip
COMMANDS = [name for name in command_names() if not name.startswith("benchmarks.")]
SECONDS = 90
MEMORY = 8 * 2**30


@dataclass(frozen=True)
class Outcome:
    """How a call ended: kind is result, one line, traceback, killed or hung.

    Args:
        kind: The kind.
        said: End of what the call printed.
    """

    kind: str
    said: str


def base_words(command: str, folder: Path) -> list[str]:
    """Arguments with which a command succeeds within seconds; its output goes to folder/out.

    Args:
        command: Name of the module.
        folder: Folder for input files, shared by all calls.
    """
    small = small_run()
    data, run, out = str(small.dataset.path), str(small.run), str(folder / "out")
    raw = small.dataset.path.parent / "raw"
    log = ["--interactions", str(raw / "interactions.parquet"), "--items", str(raw / "items.parquet")]
    columns = "--user_column user --item_column item --time_column time --title_column title"
    amazon = f"--year 2018 --reviews {folder}/reviews.json --meta {folder}/meta.json --output {out}"
    experiment = f"--experiment {folder}/e.yaml --dataset {data} --seeds 0 --output {out}"
    words = {
        "llmgr_rec.train": ["--config", str(folder / "c.yaml"), "--dataset", data, "--output", out],
        "llmgr_rec.plan": ["--config", str(folder / "c.yaml"), "--num_items", "100"],
        "llmgr_rec.evaluate": ["--run", run, "--dataset", data, "--output", f"{out}/metrics.json"],
        "llmgr_rec.score": ["--run", run, "--input", f"{data}/test", "--output", out],
        "llmgr_rec.report": ["--run", run, "--dataset", data, "--output", out, "--metrics", str(folder / "m.json")],
        "llmgr_rec.prepare": [*log, "--output", out],
        "llmgr_rec.explain": ["--run", run, "--items", "i1,i2", "--output", f"{out}/explanation.json"],
        "llmgr_rec.export": ["--run", run, "--stage", "sbr", "--output", f"{out}/model.pt2"],
        "llmgr_rec.extend": ["--run", run, "--items", str(raw / "items.parquet"), "--output", out],
        "llmgr_rec.serve": ["--run", run, "--port", "0"],
        "llmgr_rec.experiments.__main__": experiment.split(),
        "datagen.synthetic": ["--output", out, "--sessions", "50", "--items", "40"],
        "datagen.csv": f"--interactions {folder}/log.csv --items {folder}/items.csv --output {out} {columns}".split(),
        "datagen.amazon": amazon.split(),
        "datagen.movielens": ["--input", str(folder / "ml"), "--output", out],
        "torchx_components.configure": ["--output", f"{out}/torchxconfig"],
        "torchx_components.pipeline": ["--data", str(raw), "--output", out, "--config", str(folder / "c.yaml")],
    }
    return words[command]


def write_inputs(folder: Path) -> None:
    """Writes the input files of `base_words`."""
    settings = config()
    settings.align.epochs = settings.behave.epochs = 1
    for stage in ("sbr", "align", "behave", "llm_text"):
        settings.stage(stage).max_steps = 1  # type: ignore[arg-type]
    settings.runtime.eval_every = 0
    save_config(settings, folder / "c.yaml")
    variants = "variants:\n  Item-kNN: {model: item_knn}\n  GNN: {model: sbr, settings: {sbr.epochs: 1}}\n"
    (folder / "e.yaml").write_text(f"title: Small\nconfig: {folder / 'c.yaml'}\n{variants}")
    rows = [f"u{user},i{user * click % 7},{100 * user + click}" for user in range(9) for click in range(5)]
    write(folder / "log.csv", "user,item,time\n" + "\n".join(rows) + "\n")
    write(folder / "items.csv", "item,title\n" + "".join(f"i{item},Thing {item}\n" for item in range(7)))
    review = {"reviewerID": "A1", "asin": "B02", "overall": 2.0, "unixReviewTime": 1328140800}
    write(folder / "reviews.json", json_lines([review]))
    write(folder / "meta.json", json_lines([{"asin": "B02", "title": "Comb", "category": [], "brand": ""}]))
    write(folder / "ml/u.data", "196\t242\t3\t881250949\n22\t242\t1\t878887116\n")
    write(folder / "ml/u.item", "242|Kolya (1996)|01-Jan-1997||x|" + "|".join("0" * 19) + "\n")


def cases(command: str) -> Iterator[tuple[str, str]]:
    """Options of a command, each with all values; settings of a run only for train."""
    for name, option in options_of(command).items():
        if command == "llmgr_rec.plan" and "." in name:
            continue
        # Flags have no value, and groups of settings are their settings.
        if option.nargs == 0 or type(option).__name__ == "_ActionConfigLoad":
            continue
        for value in PATHS if takes_path(option) else VALUES:
            yield name, value


def call(command: str, words: list[str], log: Path, seconds: float = SECONDS) -> Outcome:
    """Runs a command in a process of its own, with limited memory and time."""
    child = os.fork()
    if not child:
        _in_child(command, words, log)
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome("hung", _end(log))
        time.sleep(0.02)
    said = log.read_text(errors="replace")
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if os.WIFSIGNALED(status):
        return Outcome("killed", f"signal {os.WTERMSIG(status)}: {_end(log)}")
    code = os.waitstatus_to_exitcode(status)
    if "Traceback" in said or (code not in (0, 2)) or (code == 2 and len(errors) != 1):
        return Outcome("traceback", f"code {code}: {_end(log)}")
    return Outcome("result" if code == 0 else "one line", errors[0] if errors else "")


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-600:]


def _in_child(command: str, words: list[str], log: Path) -> None:
    os.setpgid(0, 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    sys.argv = [command, *words]
    code: Any = 1
    try:
        with patch("torchx_components.pipeline.run_steps", _stop):
            run_cli(main_of(command))
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _stop(*_: Any) -> None:
    """The steps of a pipeline are commands of their own."""
    sys.exit(0)


def delete(paths: set[Path]) -> None:
    """Deletes files and folders."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def run_all(commands: list[str], share: tuple[int, int], report: Callable[[dict[str, Any]], None]) -> Counter[Any]:
    """Runs every case of some commands and counts the outcomes by command."""
    counts: Counter[Any] = Counter()
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        # Metrics for the report.
        main_of("llmgr_rec.evaluate")([*base_words("llmgr_rec.evaluate", folder)[:-1], str(folder / "m.json")])
        os.chdir(folder)
        inputs = set(folder.iterdir())
        for command in commands:
            base = base_words(command, folder)
            delete(set(folder.iterdir()) - inputs)
            plain = call(command, base, folder / "log", 300)
            if plain.kind != "result":
                raise RuntimeError(f"{command} {base}: {plain}")
            for number, (option, value) in enumerate(cases(command)):
                if number % share[1] != share[0]:
                    continue
                delete(set(folder.iterdir()) - inputs)
                started = time.monotonic()
                outcome = call(command, [*base, f"{option}={value}"], folder / "log")
                counts[command, outcome.kind] += 1
                seconds = round(time.monotonic() - started, 2)
                report({"command": command, "option": option, "value": value[:60], "seconds": seconds} | vars(outcome))
    return counts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Runs every option of every command with extreme values.")
    # A service runs until it is stopped.
    ending = [name for name in COMMANDS if name != "llmgr_rec.serve"]
    parser.add_argument("--commands", default=",".join(ending), help="comma-separated commands")
    parser.add_argument("--share", default="0/1", help="I/N runs every Nth case, from the Ith")
    parser.add_argument("--output", type=Path, required=True, help="file of the outcomes, one JSON object per line")
    arguments = parser.parse_args()
    index, number = map(int, arguments.share.split("/"))
    with arguments.output.open("w") as file:

        def report(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        counts = run_all(arguments.commands.split(","), (index, number), report)
    clean_up()
    for command in sorted({command for command, _ in counts}):
        kinds = {kind: count for (of, kind), count in sorted(counts.items()) if of == command}
        print(f"{command}: {sum(kinds.values())} tried, {', '.join(f'{kind} {n}' for kind, n in kinds.items())}")


if __name__ == "__main__":
    main()
