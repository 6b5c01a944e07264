"""The commands that the soak interrupts, with small inputs; each may be run again until it has finished."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from datagen.synthetic import generate
from llmgr_rec.config_file import save_config
from tests.training.small_training import small_config

_TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts={restarts}"


@dataclass(frozen=True)
class SoakStep:
    """A command.

    Args:
        name: Name in the table.
        words: Words after `python`, separated by spaces; paths are relative to the working folder.
        output: What it writes.
        finished: File that exists when it has finished, after which it is not run again; empty if it may be.
        ranks: Ranks, which torchrun starts if there are several.
        progress: How far it is, in any unit, by its working folder.
    """

    name: str
    words: str
    output: str
    finished: str = ""
    ranks: int = 1
    progress: Callable[[Path], int] | None = None

    def command(self, restarts: int) -> list[str]:
        """Words after `python`.

        Args:
            restarts: How often torchrun may start the ranks again by itself.
        """
        launcher = _TORCHRUN.format(restarts=restarts) if self.ranks > 1 else ""
        return f"{launcher} -m {self.words}".split()


def _log_lines(run: str) -> Callable[[Path], int]:
    def lines(folder: Path) -> int:
        file = folder / run / "metrics.jsonl"
        return len(file.read_bytes().splitlines()) if file.is_file() else 0

    return lines


def _parts(folder: Path) -> int:
    return len(list((folder / "scores").glob("part-*")))


STEPS = [
    SoakStep(
        "datagen.csv",
        "datagen.csv --interactions log.csv --user_column user --item_column item --time_column time --items items.csv "
        "--title_column title --category_column category --output raw",
        "raw",
        "raw/interactions.parquet",
    ),
    SoakStep(
        "datagen.amazon",
        "datagen.amazon --year 2014 --reviews reviews.json --meta meta.json --output amazon",
        "amazon",
        "amazon/interactions.parquet",
    ),
    SoakStep(
        "prepare",
        "llmgr_rec.prepare --interactions raw/interactions.parquet --items raw/items.parquet --min_interactions 0 "
        "--output dataset",
        "dataset",
        "dataset/manifest.json",
    ),
    SoakStep(
        "train, 2 ranks",
        "llmgr_rec.train --config prompts_stages.yaml --dataset dataset --output run --resume",
        "run",
        ranks=2,
        progress=_log_lines("run"),
    ),
    SoakStep(
        "train, 1 rank",
        "llmgr_rec.train --config text_stage.yaml --dataset dataset --output text --resume",
        "text",
        progress=_log_lines("text"),
    ),
    SoakStep("evaluate", "llmgr_rec.evaluate --run run --dataset dataset --output metrics.json", "metrics.json"),
    SoakStep(
        "score",
        "llmgr_rec.score --run run --input dataset/test --output scores --part_rows 4",
        "scores",
        progress=_parts,
    ),
    SoakStep(
        "score, 2 ranks",
        "llmgr_rec.score --run_folder run --input dataset/test --output scores2 --part_rows 4",
        "scores2",
        ranks=2,
    ),
    SoakStep(
        "report",
        "llmgr_rec.report --run run --dataset dataset --metrics metrics.json --scores scores --output report",
        "report",
    ),
]


def write_inputs(folder: Path) -> None:
    """Writes logs, dumps and settings."""
    generate(folder / "synthetic", sessions=120, items=64, mean_length=6)
    interactions = pq.read_table(folder / "synthetic" / "interactions.parquet").to_pylist()
    items = pq.read_table(folder / "synthetic" / "items.parquet").to_pylist()
    _write_csv(folder / "log.csv", ["user", "item", "time"], [list(row.values()) for row in interactions])
    rows = [[item["item_id"], item["title"], item["category"]] for item in items]
    _write_csv(folder / "items.csv", ["item", "title", "category"], rows)
    reviews = [
        {"reviewerID": str(user), "asin": str(item), "overall": 5.0, "unixReviewTime": int(time)}
        for user, item, time in (row.values() for row in interactions)
    ]
    _write_json_lines(folder / "reviews.json", reviews)
    meta = [
        {"asin": str(item["item_id"]), "title": item["title"], "categories": [[item["category"]]]} for item in items
    ]
    _write_json_lines(folder / "meta.json", meta)
    _write_settings(folder)


def _write_settings(folder: Path) -> None:
    """Dropout draws random numbers, log lines lie between checkpoints, and checkpoints are written by time."""
    config = small_config(folder / "prompts.yaml")
    config.prompt.templates = "prompts.yaml"
    config.encoder.dropout, config.llm.lora_dropout = 0.2, 0.1
    config.tables.knn_smoothing = [0.0, 2.0]
    config.blend.neighbors = ["item_knn"]
    config.sbr.epochs = 4
    config.runtime.log_every, config.runtime.checkpoint_minutes = 3, 0.01
    config.runtime.reader_workers = 1
    save_config(config, folder / "prompts_stages.yaml")
    config.align.epochs = config.behave.epochs = 0
    config.sbr.epochs = config.llm_text.epochs = 2
    config.text_encoder.dim, config.text_encoder.max_clicks, config.text_encoder.num_negatives = 8, 3, 8
    config.text_encoder.score_weight = [0.0, 1.0]
    config.runtime.reader_workers = 0
    save_config(config, folder / "text_stage.yaml")


def _write_csv(path: Path, header: list[str], rows: list[list[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def _write_json_lines(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
