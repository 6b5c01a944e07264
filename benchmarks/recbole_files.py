"""The same examples for both sides: some rows of a prepared data set, as a data set and as RecBole's atomic files."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.preparation.parts import PartWriter, describe_file
from llmgr_rec.data.schema import ITEMS_NAME, MANIFEST_NAME
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.protocol import split_reader

NAME = "sessions"
SPLITS = ("train", "valid")
_HEADER = "session_id:token\titem_id_list:token_seq\titem_id:token\n"
_READ_ROWS = 8192


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
        # RecBole also ranks the items of the session, so both sides do.
        repeats="allow",
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


def write_atomic_files(dataset: Dataset, folder: Path) -> dict[str, int]:
    """Writes training and validation examples as RecBole's atomic files, and the whole catalog beside them.

    They are the examples of llmgr_rec's own reader. Items are named by their index.

    Args:
        dataset: The data set.
        folder: Folder to make, `FOLDER/sessions` holds the files.

    Returns:
        Examples of each split.
    """
    place = folder / NAME
    place.mkdir(parents=True)
    # Without this file RecBole would rank only the items that occur in examples.
    names = "".join(f"{item}\n" for item in range(dataset.manifest.num_items))
    (place / f"{NAME}.item").write_text("item_id:token\n" + names)
    counts = {}
    for split in SPLITS:
        with (place / f"{NAME}.{split}.inter").open("w") as file:
            file.write(_HEADER)
            reader = split_reader(dataset, split, _READ_ROWS, _writes(file))
            counts[split] = sum(reader.batches(0))
    return counts


def _writes(file: TextIO) -> Callable[[RawSessions], int]:
    def write(raw: RawSessions) -> int:
        items, ends = list(map(str, raw.items_L.tolist())), raw.offsets_B1.tolist()
        rows = zip(raw.rows_B.tolist(), ends[:-1], ends[1:], raw.targets_B.tolist(), strict=True)
        file.writelines(f"{row}\t{' '.join(items[start:end])}\t{target}\n" for row, start, end, target in rows)
        return raw.targets_B.numel()

    return write
