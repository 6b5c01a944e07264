"""A prepared data set of random sessions with as many items as wanted, written block by block.

Shapes: R rows of a block, S clicks of all sessions.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmgr_rec.data.dataset import Manifest
from llmgr_rec.data.preparation.parts import PartWriter, describe_file
from llmgr_rec.data.schema import (
    FEATURES,
    ITEMS_NAME,
    MANIFEST_NAME,
    ROW_GROUP_ROWS,
    SPLITS,
    TEXT_COLUMNS,
    hash_item_ids,
    items_schema,
    sessions_schema,
)
from llmgr_rec.data.words import WORD_RULE

_LONGEST = 12
_BLOCK_ROWS = 64 * ROW_GROUP_ROWS
# Values of an item in each side feature, and the number of items for each value; about as in product catalogs.
_VALUES_PER_ITEM = {"category": 2, "brand": 1, "word": 6}
_ITEMS_PER_VALUE = {"category": 4000, "brand": 100, "word": 400}


def write_dataset(folder: Path, items: int, sessions: int, features: bool = False) -> None:
    """Writes a prepared data set without titles.

    Args:
        folder: Folder to create.
        items: Items of the catalog.
        sessions: Sessions of each split.
        features: Whether items have categories, brands and words.
    """
    folder.mkdir()
    rng = np.random.default_rng(0)
    vocabularies = {name: max(items // _ITEMS_PER_VALUE[name], 2) if features else 0 for name in FEATURES}
    with pq.ParquetWriter(folder / ITEMS_NAME, items_schema(pa.string()), compression="zstd") as writer:
        for block in _blocks(items):
            writer.write_table(_items_table(block, vocabularies, rng), row_group_size=ROW_GROUP_ROWS)
    catalog_hash = hash_item_ids(_ids(block) for block in _blocks(items))
    for split in SPLITS:
        lengths = rng.integers(1, _LONGEST, sessions)
        clicks_S = pa.array(rng.integers(0, items, lengths.sum()))
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        writer = PartWriter(folder / split, sessions_schema(catalog_hash))
        names = pa.array([f"s{row}" for row in range(sessions)])
        writer.write([names, pa.ListArray.from_arrays(offsets, clicks_S), pa.array(rng.integers(0, items, sessions))])
        writer.close()
    manifest = Manifest(
        num_items=items,
        num_sessions=dict.fromkeys(SPLITS, sessions),
        num_examples=dict.fromkeys(SPLITS, sessions),
        split="leave_one_out",
        max_length=50,
        min_interactions=0,
        prefix_augmentation=[],
        features={name: {"num_embeddings": size} for name, size in vocabularies.items() if size},
        has_text=False,
        catalog_hash=catalog_hash,
        files={str(path.relative_to(folder)): describe_file(path) for path in sorted(folder.rglob("*.parquet"))},
        word_rule=WORD_RULE,
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def _blocks(items: int) -> Iterator[range]:
    for first in range(0, items, _BLOCK_ROWS):
        yield range(first, min(first + _BLOCK_ROWS, items))


def _ids(items: range) -> pa.Array:
    numbers = pa.array(np.arange(items.start, items.stop)).cast(pa.string())
    return pc.binary_join_element_wise("i", numbers, "")


def _items_table(items: range, vocabularies: dict[str, int], rng: np.random.Generator) -> pa.Table:
    numbers_R = np.arange(items.start, items.stop)
    columns = {
        "index": pa.array(numbers_R),
        "item_id": _ids(items),
        **dict.fromkeys(TEXT_COLUMNS, pa.nulls(len(items), pa.string())),
        "train_count": pa.array(rng.integers(1, 100, len(items))),
    }
    for name, size in vocabularies.items():
        count = _VALUES_PER_ITEM[name] if size else 0
        values = rng.integers(0, max(size, 1), count * len(items))
        # The largest id is used, since a catalog does not record its vocabulary.
        if size and items.start == 0:
            values[0] = size - 1
        offsets = pa.array(np.arange(len(items) + 1) * count, pa.int32())
        columns[f"{name}_ids"] = pa.ListArray.from_arrays(offsets, pa.array(values))
    return pa.table(columns, schema=items_schema(pa.string()))
