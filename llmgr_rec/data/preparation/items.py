"""Writes items.parquet: the catalog with texts, training clicks and side feature ids."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmgr_rec.data.preparation.database import Database
from llmgr_rec.data.schema import (
    DOMAIN,
    FEATURES,
    HELD_OUT,
    ROW_GROUP_ROWS,
    TEXT_COLUMNS,
    domains_of_ids,
    hash_item_ids,
    items_schema,
)
from llmgr_rec.data.words import words_of

# Document frequency bounds of title words. A word of a single title identifies the item, a word of many titles carries
# little information.
_MIN_TITLES = 2
_MAX_TITLE_SHARE = 0.1
# Commas of Latin, of Chinese and Japanese, and of Arabic script.
_COMMA = re.compile("[,\u3001\u060c]")


@dataclass
class Vocabulary:
    """Ids of the values of a side feature, numbered by first occurrence.

    Args:
        column: Text column of the values.
        parse: Function from a text to its values.
        allowed: Values that get an id; None allows all.
        ids: Id of each value so far.
    """

    column: str
    parse: Callable[[str | None], list[str]]
    allowed: set[str] | None = None
    ids: dict[str, int] = field(default_factory=dict)

    def encode(self, texts: list[str | None]) -> list[list[int]]:
        """Ids of the values of each item.

        Args:
            texts: Texts of the items in the column.
        """
        known: dict[str | None, list[int]] = {}
        for text in texts:
            if text not in known:
                values = [value for value in self.parse(text) if self.allowed is None or value in self.allowed]
                known[text] = [self.ids.setdefault(value, len(self.ids)) for value in values]
        return [known[text] for text in texts]


def category_paths(text: str | None) -> list[str]:
    """The values of a category text: every prefix of every path, without duplicates.

    Args:
        text: Levels are separated by " > " and alternatives by " | ". An alternative without levels (film genres) is
            also split at commas. "Beauty > Hair Care" gives "Beauty" and "Beauty > Hair Care". Values that differ in
            their Unicode form only are the same (NFKC).
    """
    values: dict[str, None] = {}
    for alternative in unicodedata.normalize("NFKC", text or "").split(" | "):
        # In a path, a comma is part of a name ("Bath, Shower & Soap").
        if " > " in alternative:
            levels = [level.strip() for level in alternative.split(" > ") if level.strip()]
            values.update((" > ".join(levels[: depth + 1]), None) for depth in range(len(levels)))
        else:
            values.update((name.strip(), None) for name in _COMMA.split(alternative) if name.strip())
    return list(values)


def brand_values(text: str | None) -> list[str]:
    """The brand, in Unicode form NFKC, as a list of one, or an empty list."""
    brand = unicodedata.normalize("NFKC", text or "").strip()
    return [brand] if brand else []


def title_words(text: str | None) -> list[str]:
    """The words of a title, without duplicates."""
    return list(dict.fromkeys(words_of(text)))


def frequent_title_words(titles: Iterable[str | None]) -> set[str]:
    """Words that occur in at least two titles of a catalog and in at most a tenth of them.

    Args:
        titles: Title of each item.
    """
    counts: Counter[str] = Counter()
    num_items = 0
    for title in titles:
        num_items += 1
        counts.update(title_words(title))
    return {word for word, count in counts.items() if _MIN_TITLES <= count <= _MAX_TITLE_SHARE * num_items}


def vocabularies(words: set[str]) -> dict[str, Vocabulary]:
    """An empty vocabulary of each side feature.

    Args:
        words: Words of titles that get an id.
    """
    return {
        "category": Vocabulary("category", category_paths),
        "brand": Vocabulary("brand", brand_values),
        "word": Vocabulary("title", title_words, words),
    }


def catalog_hash(database: Database) -> str:
    """Hash of the catalog's item ids in index order.

    Args:
        database: Scratch database with tables items and catalog.
    """
    ids = database.stream("SELECT i.item_id FROM catalog c JOIN items i USING (key) ORDER BY c.index")
    return hash_item_ids(batch.column(0) for batch in ids)


def write_items(
    database: Database,
    path: Path,
    item_id_type: pa.DataType,
    train_count_V: npt.NDArray[np.int64],
    held_out_V: npt.NDArray[np.bool_],
    in_domains: bool = False,
) -> tuple[dict[str, dict[str, int]], bool]:
    """Writes items.parquet.

    Args:
        database: Scratch database with tables items and catalog.
        path: File to write.
        item_id_type: string or int64.
        train_count_V: Number of training clicks of each item.
        held_out_V: Whether each item is held out of training. The column is written only if an item is.
        in_domains: Whether the ids begin with the names of domains, which are written as a column.

    Returns:
        Vocabulary size of each side feature that has values, and whether any item has a title or description.
    """
    titles = database.stream("SELECT i.title FROM catalog c JOIN items i USING (key)")
    features = vocabularies(frequent_title_words(title for batch in titles for title in batch.column(0).to_pylist()))
    schema = items_schema(item_id_type, bool(held_out_V.any()), in_domains)
    has_text = False
    texts = ", ".join(f"i.{name}" for name in TEXT_COLUMNS)
    batches = database.stream(
        f'SELECT c."index", i.item_id, {texts} FROM catalog c JOIN items i USING (key) ORDER BY c."index"'
    )
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            has_text = has_text or any(_any_text(batch.column(name)) for name in ("title", "description"))
            feature_ids = {
                name: features[name].encode(batch.column(features[name].column).to_pylist()) for name in FEATURES
            }
            first = batch.column("index")[0].as_py()
            columns = {name: batch.column(name) for name in ("index", "item_id")}
            # Tokenizers of language models know letters with accents as one character.
            columns |= {name: pc.utf8_normalize(batch.column(name), "NFC") for name in TEXT_COLUMNS}
            columns["train_count"] = pa.array(train_count_V[first : first + batch.num_rows])
            if in_domains:
                columns[DOMAIN] = domains_of_ids(batch.column("item_id"))
            columns[HELD_OUT] = pa.array(held_out_V[first : first + batch.num_rows])
            columns |= {f"{name}_ids": pa.array(ids, pa.list_(pa.int64())) for name, ids in feature_ids.items()}
            table = pa.table([columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema)
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
    sizes = {name: {"num_embeddings": len(values.ids)} for name, values in features.items() if values.ids}
    return sizes, has_text


def _any_text(column: pa.Array) -> bool:
    return bool(pc.any(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0)).as_py())
