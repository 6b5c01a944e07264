"""The catalog of a run for other items: known items keep what the run knows of them, new ones get their values.

Shapes: V items of the new catalog.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.domains import ItemDomains
from llmgr_rec.data.item_ids import are_ids, int64_ids, is_text, plain_ids
from llmgr_rec.data.preparation.items import vocabularies
from llmgr_rec.data.schema import (
    DOMAIN,
    DOMAIN_SEPARATOR,
    FEATURES,
    ITEMS_NAME,
    ROW_GROUP_ROWS,
    TEXT_COLUMNS,
    domains_of_ids,
    items_schema,
)
from llmgr_rec.data.side_values import VALUES_KEY, side_values
from llmgr_rec.errors import UserError, did_you_mean


def write_extended_items(known: Catalog, items: pa.Table, name: str, folder: Path) -> Catalog:
    """Writes the catalog of other items, in their order, with the side features that a run has learned.

    A category, brand or word that the run does not know has no row in its tables, and is left out. A text that is null
    or whose column is missing is that of the run.

    Args:
        known: Catalog of the run.
        items: The whole new catalog: `item_id` and, each optional, `title`, `category`, `brand`, `description`.
        name: Name of the items, for messages.
        folder: Folder to write items.parquet to.

    Returns:
        The new catalog. New items have no training clicks.

    Raises:
        UserError: A column is missing or has a wrong type, an id is null or a duplicate or cannot be one of the run, or
            there are no items; or an id has no domain, and those of the run have one.
    """
    ids = _item_ids(known, items, name)
    rows_V = known.index_of(ids)
    is_known_V = rows_V >= 0
    # Null for a new item.
    known_rows = pa.array(rows_V, mask=~is_known_V)
    texts = {column: _text(known, items, column, known_rows, name) for column in TEXT_COLUMNS}
    learned = side_values(known)
    features = vocabularies(set(learned.get("word", [])))
    columns: dict[str, pa.Array] = {"index": pa.array(np.arange(len(ids))), "item_id": ids, **texts}
    columns["train_count"] = pa.array(np.where(is_known_V, known.train_count_V.numpy()[rows_V], 0))
    for feature in FEATURES:
        vocabulary = features[feature]
        vocabulary.allowed = set(learned.get(feature, []))
        values = vocabulary.encode(texts[vocabulary.column].to_pylist())
        columns[f"{feature}_ids"] = pa.array(values, pa.list_(pa.int64()))
    named = {feature: list(features[feature].ids) for feature in FEATURES}
    if known.domains is not None:
        columns[DOMAIN] = _domains(known.domains, ids, name)
    schema = items_schema(ids.type, with_domain=known.domains is not None).with_metadata(
        {VALUES_KEY: json.dumps(named).encode()}
    )
    table = pa.table([columns[column] for column in schema.names], schema=schema)
    pq.write_table(table, folder / ITEMS_NAME, compression="zstd", row_group_size=ROW_GROUP_ROWS)
    return Catalog.load(folder)


def join_domains(items: Mapping[str, pa.Table], known: ItemDomains | None, name: str) -> pa.Table:
    """One table of the items of several domains, with the ids that the run gives them: `beauty:B001`.

    Args:
        items: Items of each domain, with the ids of its log. Texts that only some domains have are null for the others.
        known: Domains of the run.
        name: Name of the items, for messages.

    Raises:
        UserError: The run has no domains, or a table has no usable item_id.
    """
    if known is None:
        raise UserError(
            f"{name} names domains, but the run was trained on one log without a name; give its items alone"
        )
    tables = []
    for domain, table in items.items():
        ids = _given_ids(table, f"{name}, domain {domain}")
        text = plain_ids(ids.cast(pa.string())) if is_text(ids.type) else int64_ids(ids).cast(pa.string())
        full = pc.binary_join_element_wise(f"{domain}{DOMAIN_SEPARATOR}", text, "")
        columns = [column for column in TEXT_COLUMNS if column in table.column_names]
        tables.append(table.select(columns).add_column(0, "item_id", full))
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"{name}: texts of the domains differ in type ({str(error).splitlines()[0]})") from None


def _given_ids(items: pa.Table, name: str) -> pa.Array:
    if "item_id" not in items.column_names:
        raise UserError(f"{name} has no column item_id{did_you_mean('item_id', items.column_names)}")
    given = items["item_id"].combine_chunks()
    if not are_ids(given.type):
        raise UserError(f"{name}: column item_id is {given.type}, but must be text or integers")
    if missing := given.null_count:
        raise UserError(f"{name}: column item_id has {missing:,} nulls; give every item an id")
    return given


def _item_ids(known: Catalog, items: pa.Table, name: str) -> pa.Array:
    """The ids of the items, of the type of those of the run."""
    given = _given_ids(items, name)
    if not len(given):
        raise UserError(f"{name} has no items; give the whole current catalog")
    if pa.types.is_string(known.item_ids.type):
        rows_V = known.index_of(given)
        of_run = known.item_ids.take(pa.array(rows_V, mask=rows_V < 0))
        # As the run writes them: `12` for 12.0.
        ids = pc.coalesce(of_run, (given if is_text(given.type) else int64_ids(given)).cast(pa.string()))
    else:
        ids = int64_ids(given)
        if ids.null_count:
            other = given.filter(ids.is_null())[0].as_py()
            raise UserError(
                f"{name}: item_id {other!r} is not an integer, but those of the run are; give it an integer, or "
                "prepare and train again with ids as text"
            )
    _refuse_duplicates(ids, name)
    return ids


def _domains(known: ItemDomains, ids: pa.Array, name: str) -> pa.Array:
    """Name of the domain of each item. One that the run does not know is new, unless it is nearly one that it knows."""
    names = domains_of_ids(ids)
    if names.null_count:
        first = ids.filter(names.is_null())[0].as_py()
        raise UserError(f"{name}: item_id {first!r} has no domain; write it as {known.names[0]}:{first}")
    for found in names.unique().to_pylist():
        if found not in known.names and difflib.get_close_matches(found, known.names, n=1):
            raise UserError(f"{name}: item ids begin with {found}:{did_you_mean(found, known.names)}")
    return names


def _refuse_duplicates(ids: pa.Array, name: str) -> None:
    counts = ids.value_counts()
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        first = repeated.field("values")[0].as_py()
        raise UserError(
            f"{name}: item_id {first!r} occurs more than once ({len(repeated):,} ids do); keep one row per item"
        )


def _text(known: Catalog, items: pa.Table, column: str, known_rows: pa.Array, name: str) -> pa.Array:
    of_run = known.column(column).take(known_rows)
    if column not in items.column_names:
        return of_run
    try:
        given = items[column].combine_chunks().cast(pa.string())
    except pa.ArrowException:
        raise UserError(f"{name}: column {column} is {items[column].type}, but must be text") from None
    # Tokenizers of language models know letters with accents as one character.
    return pc.coalesce(pc.utf8_normalize(given, "NFC"), of_run)
