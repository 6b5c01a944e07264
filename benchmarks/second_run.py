"""Processor time of the commands of a run, and of the same commands into another folder, which reuse results.

```sh
python -m benchmarks.second_run
python -m benchmarks.second_run --data runs/beauty/raw
```

Training takes one step a stage, so that what is left is what does not train: start, tokens and embeddings of item
texts, neighbors, validation, export. The first run begins with an empty cache of results. The language model is in the
cache before, because it is converted once per machine.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.commands import run_module
from benchmarks.harness import benchmark_parser, write_report
from llmgr_rec.cache import cache_folder
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.paths import LocalPath
from llmgr_rec.storage.pretrained import pretrained_folder

_STEPS = [
    word for stage in ("sbr", "align", "behave") for word in (f"--{stage}.epochs", "1", f"--{stage}.max_steps", "1")
]


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and measures."""
    parser = benchmark_parser("second_run", "Measures what the second run of the same commands costs.")
    parser.add_argument("--data", type=LocalPath | None, help="Folder with raw files; default: MovieLens-100K.")
    parser.add_argument("--config", type=str, default="quickstart", help="Recipe.")
    parser.add_argument("--llm", type=str, default="smollm2", help="Language model.")
    args = parse_args(parser, argv).as_dict()
    if args["llm"] == "smollm2":
        pretrained_folder(args["llm"])
    with tempfile.TemporaryDirectory(prefix="llmgr-second-run-") as folder:
        cache = Path(folder) / "cache"
        cache.mkdir()
        for made in cache_folder().glob("*"):
            if made.name != "results":
                (cache / made.name).symlink_to(made)
        results = {
            name: run_commands(Path(folder) / name, args["data"], args["config"], args["llm"], args["threads"], cache)
            for name in ("first", "second")
        }
    print(table(results))
    write_report(args["output"], args, results)


def run_commands(
    folder: Path, data: str | None, config: str, language_model: str, threads: int, cache: Path
) -> dict[str, float]:
    """Runs the commands into an empty folder.

    Args:
        folder: The folder.
        data: Folder with raw files; None converts MovieLens-100K.
        config: Recipe.
        language_model: Language model.
        threads: CPU threads; 0 uses all cores.
        cache: Folder of caches.

    Returns:
        Processor seconds of each command.
    """
    raw, dataset, run = Path(data) if data else folder / "raw", str(folder / "dataset"), str(folder / "run")
    inputs = ["--interactions", str(raw / "interactions.parquet"), "--items", str(raw / "items.parquet")]
    training = ["--config", config, "--llm.name_or_path", language_model, *_STEPS]
    commands = {
        "datagen.movielens": [] if data else ["--output", str(raw)],
        "llmgr_rec.prepare": [*inputs, "--output", dataset, "--threads", str(threads)],
        "llmgr_rec.train": [
            *training,
            "--dataset",
            dataset,
            "--output",
            run,
            "--runtime.threads_per_rank",
            str(threads),
        ],
    }
    environment = {"LLMGR_CACHE": str(cache), "LLMGR_CACHE_GB": "5"}
    return {
        module: run_module(module, words, environment=environment).processor_s
        for module, words in commands.items()
        if words
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as text."""
    lines = [f"{'processor seconds':>20}" + "".join(f"{name:>10}" for name in results)]
    lines += [
        f"{module:>20}" + "".join(f"{of[module]:>10.2f}" for of in results.values()) for module in results["first"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
