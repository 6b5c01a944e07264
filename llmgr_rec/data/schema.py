"""Format of prepared data sets: names, column types and sizes of their files."""

import hashlib
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

FORMAT_VERSION = 1
SPLITS = ("train", "valid", "test")

MANIFEST_NAME = "manifest.json"
ITEMS_NAME = "items.parquet"

# Rows of a row group, the unit that a reader decodes and caches.
ROW_GROUP_ROWS = 8192
# Rows of a part file: a multiple of the row group, so that only the last group of a part is short.
PART_ROWS = 128 * ROW_GROUP_ROWS

TEXT_COLUMNS = ("title", "category", "brand", "description")
FEATURES = ("category", "brand", "word")
# Column of items.parquet, present if any item is held out of training.
HELD_OUT = "held_out"
# Column of items.parquet, present if there are several domains.
DOMAIN = "domain"
# Between the name of a domain and the id of an item or a user in it. Names do not contain it.
DOMAIN_SEPARATOR = ":"

# Parquet schema metadata of the parts, by which scoring distinguishes item indices from raw ids.
ITEMS_KIND_KEY = b"llmgr_rec.items"
ITEMS_KIND_INDEX = b"index"
# Its name in the files of version 0.1, which are still read.
CATALOG_HASH_KEY = b"llmgr_rec.catalogue_hash"


def sessions_schema(catalog_hash: str) -> pa.Schema:
    """Schema of the part files of a split.

    Args:
        catalog_hash: Hash of the catalog that the indices in `items` and `target` refer to; see `hash_item_ids`.
    """
    return pa.schema(
        [
            pa.field("session_id", pa.string(), nullable=False),
            pa.field("items", pa.list_(pa.int64()), nullable=False),
            pa.field("target", pa.int64(), nullable=False),
        ],
        metadata={ITEMS_KIND_KEY: ITEMS_KIND_INDEX, CATALOG_HASH_KEY: catalog_hash.encode()},
    )


def items_schema(item_id_type: pa.DataType, with_held_out: bool = False, with_domain: bool = False) -> pa.Schema:
    """Schema of items.parquet; row i describes item index i.

    Args:
        item_id_type: Type of the raw ids, string or int64.
        with_held_out: Whether a column marks the items that are held out of training.
        with_domain: Whether a column names the domains of the items.
    """
    return pa.schema(
        [
            pa.field("index", pa.int64(), nullable=False),
            pa.field("item_id", item_id_type, nullable=False),
            *(pa.field(name, pa.string()) for name in TEXT_COLUMNS),
            pa.field("train_count", pa.int64(), nullable=False),
            *(pa.field(f"{name}_ids", pa.list_(pa.int64()), nullable=False) for name in FEATURES),
            *([pa.field(HELD_OUT, pa.bool_(), nullable=False)] if with_held_out else []),
            *([pa.field(DOMAIN, pa.string(), nullable=False)] if with_domain else []),
        ]
    )


def hash_item_ids(batches: Iterable[pa.Array]) -> str:
    """Hash of a catalog: sha256 over the item ids in index order, each as UTF-8 text followed by a zero byte.

    Args:
        batches: Arrays of ids, string or int64, in index order.

    Returns:
        Hexadecimal digest.
    """
    digest = hashlib.sha256()
    for batch in batches:
        for item_id in batch.cast(pa.string()).to_pylist():
            digest.update(item_id.encode() + b"\0")
    return digest.hexdigest()


def domains_of_ids(ids: pa.Array) -> pa.Array:
    """Name of the domain in each id, string; null for an id without one.

    Args:
        ids: Ids of items or users, string.
    """
    return pc.struct_field(pc.extract_regex(ids, f"(?s)^(?P<name>[^{DOMAIN_SEPARATOR}]+){DOMAIN_SEPARATOR}."), "name")


def has_item_indices(schema: pa.Schema) -> bool:
    """Whether a file is a split of a prepared data set, whose items are indices and not raw ids."""
    return bool((schema.metadata or {}).get(ITEMS_KIND_KEY) == ITEMS_KIND_INDEX)
