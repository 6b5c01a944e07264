"""Small raw inputs for the tests of prepare, and a reader of what it wrote."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.preparation.pipeline import prepare_dataset
from llmgr_rec.data.preparation.settings import PrepareSettings
from tests.json_files import edit_json

Click = tuple[str, str, int]
Row = tuple[str, tuple[Any, ...], Any]


def write_interactions(path: Path, clicks: list[Click], **more: list[Any]) -> Path:
    """Clicks (user, item, time) as a Parquet file, with more columns by name."""
    columns = {
        "user_id": pa.array([user for user, _, _ in clicks], pa.string()),
        "item_id": pa.array([item for _, item, _ in clicks], pa.string()),
        "timestamp": pa.array([time for _, _, time in clicks], pa.int64()),
    }
    pq.write_table(pa.table(columns | {name: pa.array(values) for name, values in more.items()}), path)
    return path


def write_items(path: Path, item_ids: list[Any], **more: list[Any]) -> Path:
    """A catalog with titles; more columns by name, which may replace the titles."""
    columns = {"item_id": pa.array(item_ids), "title": pa.array([f"title of {item}" for item in item_ids], pa.string())}
    pq.write_table(pa.table(columns | {name: pa.array(values) for name, values in more.items()}), path)
    return path


@dataclass
class Prepared:
    """A data set read back with raw ids."""

    dataset: Dataset
    items: list[dict[str, Any]]
    rows: dict[str, list[Row]]

    @property
    def ids(self) -> list[Any]:
        """Raw item ids in index order."""
        return [item["item_id"] for item in self.items]


def prepare(folder: Path, clicks: list[Click] | None = None, **settings: Any) -> Prepared:
    """Writes inputs as far as they are not given as settings, prepares them and reads the result."""
    if clicks is not None:
        settings["interactions"] = str(write_interactions(folder / "interactions.parquet", clicks))
        if "items" not in settings:
            known = sorted({item for _, item, _ in clicks})
            settings["items"] = str(write_items(folder / "items.parquet", known))
    settings.setdefault("output", str(folder / "dataset"))
    prepare_dataset(PrepareSettings(**{"threads": 1, "min_interactions": 0} | settings))
    return read(Path(settings["output"]))


def read(path: Path) -> Prepared:
    """Reads a data set back with raw ids."""
    dataset = Dataset(path)
    items = pq.read_table(dataset.items_path).to_pylist()
    ids = [item["item_id"] for item in items]
    rows = {
        split: [
            (row["session_id"], tuple(ids[i] for i in row["items"]), ids[row["target"]])
            for part in dataset.parts(split)
            for row in pq.read_table(part).to_pylist()
        ]
        for split in ("train", "valid", "test")
    }
    return Prepared(dataset, items, rows)


def edit_manifest(dataset: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes what manifest.json of a data set says."""
    edit_json(dataset / "manifest.json", change)
