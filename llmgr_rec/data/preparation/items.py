"""Writes items.parquet: the catalogue with text, training counts and the ids of its side features."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmgr_rec.data.preparation.database import Database
from llmgr_rec.data.schema import FEATURES, HELD_OUT, ROW_GROUP_ROWS, TEXT_COLUMNS, hash_item_ids, items_schema


@dataclass
class Vocabulary:
    """Ids of feature values, numbered by first appearance.

    Args:
        ids: Value -> id.
    """

    ids: dict[str, int] = field(default_factory=dict)
    _known: dict[str, list[int]] = field(default_factory=dict)

    def encode(self, text: str | None, values: list[str]) -> list[int]:
        """Ids of an item's values.

        Args:
            text: The raw text, under which the result is remembered.
            values: The values it stands for.
        """
        key = text or ""
        if key not in self._known:
            self._known[key] = [self.ids.setdefault(value, len(self.ids)) for value in values]
        return self._known[key]


def category_paths(text: str | None) -> list[str]:
    """The values that a category text stands for: every prefix of every path, without repeats.

    Args:
        text: Levels are split by " > ", alternatives by " | ", and by "," where an alternative has no levels (film
            genres); "Beauty > Hair Care" gives "Beauty" and "Beauty > Hair Care".
    """
    values: dict[str, None] = {}
    for alternative in (text or "").split(" | "):
        # A comma inside a path is part of a name ("Bath, Shower & Soap").
        if " > " in alternative:
            levels = [level.strip() for level in alternative.split(" > ") if level.strip()]
            values.update((" > ".join(levels[: depth + 1]), None) for depth in range(len(levels)))
        else:
            values.update((name.strip(), None) for name in alternative.split(",") if name.strip())
    return list(values)


def brand_values(text: str | None) -> list[str]:
    """The single brand, or nothing."""
    return [text.strip()] if text and text.strip() else []


_PARSERS = {"category": category_paths, "brand": brand_values}


def catalogue_hash(database: Database) -> str:
    """Hash of the catalogue's item ids in index order.

    Args:
        database: Scratch database with tables items and catalogue.
    """
    ids = database.stream("SELECT i.item_id FROM catalogue c JOIN items i USING (key) ORDER BY c.index")
    return hash_item_ids(batch.column(0) for batch in ids)


def write_items(
    database: Database,
    path: Path,
    item_id_type: pa.DataType,
    train_count_V: npt.NDArray[np.int64],
    held_out_V: npt.NDArray[np.bool_],
) -> tuple[dict[str, dict[str, int]], bool]:
    """Writes items.parquet.

    Args:
        database: Scratch database with tables items and catalogue.
        path: File to write.
        item_id_type: string or int64.
        train_count_V: Training clicks of each item.
        held_out_V: Whether each item is held out of training; left out of the file if none is.

    Returns:
        The side features present with the sizes of their vocabularies, and whether any item has a title or description.
    """
    vocabularies = {name: Vocabulary() for name in FEATURES}
    schema = items_schema(item_id_type, bool(held_out_V.any()))
    has_text = False
    texts = ", ".join(f"i.{name}" for name in TEXT_COLUMNS)
    batches = database.stream(
        f'SELECT c."index", i.item_id, {texts} FROM catalogue c JOIN items i USING (key) ORDER BY c."index"'
    )
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            has_text = has_text or any(_any_text(batch.column(name)) for name in ("title", "description"))
            feature_ids = {
                name: [vocabulary.encode(text, _PARSERS[name](text)) for text in batch.column(name).to_pylist()]
                for name, vocabulary in vocabularies.items()
            }
            first = batch.column("index")[0].as_py()
            columns = {name: batch.column(name) for name in ("index", "item_id", *TEXT_COLUMNS)}
            columns["train_count"] = pa.array(train_count_V[first : first + batch.num_rows])
            columns[HELD_OUT] = pa.array(held_out_V[first : first + batch.num_rows])
            columns |= {f"{name}_ids": pa.array(ids, pa.list_(pa.int64())) for name, ids in feature_ids.items()}
            table = pa.table([columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema)
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
    features = {name: {"num_embeddings": len(v.ids)} for name, v in vocabularies.items() if v.ids}
    return features, has_text


def _any_text(column: pa.Array) -> bool:
    return bool(pc.any(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0)).as_py())
