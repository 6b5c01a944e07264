"""A prepared split and its catalog, written directly from the planted world, without titles for millions of items."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from datagen import planted
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.preparation.parts import PartWriter
from llmgr_rec.data.schema import ITEMS_NAME, sessions_schema

# As in `datagen.planted`: the share of steps that only titles explain, and the share of rare items.
_TEXT_SHARE, _RARE_SHARE = 0.5, 0.3
_NUM_CATEGORIES, _NUM_BRANDS = 300, 2000


def write_split(folder: Path, sessions: int, items: int, mean_length: float, seed: int) -> tuple[list[Path], Catalog]:
    """Writes the part files of a split as `llmgr_rec.prepare` does.

    Args:
        folder: Folder to make.
        sessions: Rows.
        items: Size of the catalog.
        mean_length: Mean clicks per row, without the target.
        seed: Seed of the sessions and of the side features.

    Returns:
        The part files, and the catalog with one category and one brand per item.
    """
    world = planted.plant(items, mean_length + 1, _TEXT_SHARE, _RARE_SHARE, seed)
    counts_V = np.zeros(items, dtype=np.int64)
    folder.parent.mkdir(parents=True, exist_ok=True)
    writer = PartWriter(folder, sessions_schema(""))
    done = 0
    for items_L, offsets_B1, _ in planted.sessions(world, sessions):
        counts_V += np.bincount(items_L, minlength=items)
        ends_B = offsets_B1[1:] - 1
        is_click = np.ones(len(items_L), dtype=bool)
        is_click[ends_B] = False
        size = len(ends_B)
        offsets = pa.array((offsets_B1 - np.arange(size + 1)).astype(np.int32))
        names = pa.array(np.arange(done, done + size)).cast(pa.string())
        writer.write([names, pa.ListArray.from_arrays(offsets, pa.array(items_L[is_click])), pa.array(items_L[ends_B])])
        done += size
    writer.close()
    return sorted(folder.glob("part-*.parquet")), _catalog(folder.parent / ITEMS_NAME, counts_V, seed)


def _catalog(file: Path, counts_V: np.ndarray, seed: int) -> Catalog:
    generator = torch.Generator().manual_seed(seed)
    ones_V = torch.ones(len(counts_V), dtype=torch.int64)
    features = {
        name: Jagged.from_lengths(torch.randint(size, (len(counts_V),), generator=generator), ones_V)
        for name, size in (("category", _NUM_CATEGORIES), ("brand", _NUM_BRANDS))
    }
    return Catalog(file, pa.array(np.arange(len(counts_V))), torch.from_numpy(counts_V), features)
