"""Some rows of a prepared data set as a data set, so that all sides of a comparison have the same examples."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.preparation.parts import PartWriter, describe_file
from llmgr_rec.data.schema import ITEMS_NAME, MANIFEST_NAME
from llmgr_rec.errors import UserError


def write_part(dataset: Dataset, folder: Path, most: Mapping[str, int], seed: int) -> Dataset:
    """Writes some rows of a data set as a data set.

    The catalog stays complete, so the ranking task is as large as before.

    Args:
        dataset: The data set.
        folder: Folder to make.
        most: Most examples of each split, counting the prefixes of rows in an augmented split; 0 takes all.
        seed: Seed of the choice of rows.

    Raises:
        UserError: The first row drawn has more examples than that, or the data set has no validation rows.
    """
    manifest = dataset.manifest
    if not manifest.num_sessions["valid"]:
        raise UserError(f"{dataset.path} has no validation rows; prepare it with some")
    folder.mkdir(parents=True)
    shutil.copyfile(dataset.items_path, folder / ITEMS_NAME)
    written = {split: _write_rows(dataset, split, folder, most.get(split, 0), seed) for split in manifest.num_sessions}
    files = {str(path.relative_to(folder)): describe_file(path) for path in sorted(folder.rglob("*.parquet"))}
    part = replace(
        manifest,
        num_sessions={split: rows for split, (rows, _) in written.items()},
        num_examples={split: examples for split, (_, examples) in written.items()},
        files=files,
    )
    (folder / MANIFEST_NAME).write_text(part.to_json())
    return Dataset(folder)


def _write_rows(dataset: Dataset, split: str, folder: Path, most: int, seed: int) -> tuple[int, int]:
    """Writes random rows in their original order; returns the number of rows and of examples."""
    parts = dataset.parts(split)
    table = pa.concat_tables([pq.read_table(part) for part in parts]).combine_chunks()
    prefixes = split in dataset.manifest.prefix_augmentation
    sizes = np.array([len(row) if prefixes else 1 for row in table["items"]], dtype=np.int64)
    drawn = np.random.default_rng(seed).permutation(len(sizes))
    chosen = np.sort(drawn[np.cumsum(sizes[drawn]) <= most] if most else drawn)
    if most and not len(chosen):
        raise UserError(f"{most} {split} examples are fewer than the first row drawn has; allow more")
    writer = PartWriter(folder / split, pq.read_schema(parts[0]))
    for batch in table.take(pa.array(chosen)).to_batches():
        writer.write(batch.columns)
    writer.close()
    return len(chosen), int(sizes[chosen].sum())
