"""The item catalog: id, side features and text of each item index.

Shapes: V items.
"""

import hashlib
import itertools
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from llmgr_rec.data.catalog_columns import (
    check_index,
    column_names,
    one_array,
    read_categories,
    read_ids,
    read_integers,
    read_lists,
    readable,
    require_columns,
)
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.domains import ItemDomains
from llmgr_rec.data.item_ids import are_ids, int64_ids, is_text, plain_ids
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.schema import DOMAIN, FEATURES, ITEMS_NAME, TEXT_COLUMNS, hash_item_ids
from llmgr_rec.data.text_index import TextIndex
from llmgr_rec.errors import UserError, did_you_mean
from llmgr_rec.remote_path import as_path

_TEXT_SEPARATOR = ", "
_HASHED_VALUES = 1 << 16


class Catalog:
    """Items in index order. Texts are read from disk on each call of `titles` or `texts`.

    Args:
        file: The items.parquet that was read.
        item_ids: Raw ids, string or int64; element i belongs to item index i.
        train_count_V: Number of training clicks of each item, targets included, int64.
        features: Ids of each side feature that at least one item has, one row per item.
        domains: The domain of each item; None for a catalog of one log.
    """

    def __init__(
        self,
        file: Path,
        item_ids: pa.Array,
        train_count_V: Tensor,
        features: dict[str, Jagged] | None = None,
        domains: ItemDomains | None = None,
    ) -> None:
        self.file = file
        self._item_ids: pa.Array | None = item_ids
        self.train_count_V = train_count_V
        self.features = features or {}
        self.domains = domains

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads the catalog of a prepared data set or of an exported bundle.

        Args:
            path: Folder with items.parquet.

        Raises:
            UserError: The file is missing or truncated, or does not have the format that `prepare` writes.
        """
        file = as_path(path) / ITEMS_NAME
        found = column_names(file)
        # Data sets of early versions have no column word_ids and are still valid.
        columns = [f"{name}_ids" for name in FEATURES if name != "word" or "word_ids" in found]
        require_columns(file, ["index", "item_id", "train_count"])
        require_columns(file, columns)
        item_ids = read_ids(file)
        check_index(file)
        features = {name.removesuffix("_ids"): read_lists(file, name) for name in columns}
        return cls(
            file=file,
            item_ids=item_ids,
            train_count_V=torch.from_numpy(read_integers(file, "train_count")),
            features={name: rows for name, rows in features.items() if rows.values.numel()},
            domains=ItemDomains.of_column(read_categories(file, DOMAIN)) if DOMAIN in found else None,
        )

    @classmethod
    def of(cls, dataset: Dataset) -> Self:
        """Reads the catalog of a data set, after its file was compared with the recorded checksum.

        Args:
            dataset: The data set.

        Raises:
            UserError: The file is damaged, or does not have the format that `prepare` writes.
        """
        return cls.load(dataset.verified(ITEMS_NAME).parent)

    @property
    def num_items(self) -> int:
        """Number of items V."""
        return len(self.train_count_V)

    @property
    def num_embeddings(self) -> dict[str, int]:
        """Vocabulary size of each side feature."""
        return {name: int(rows.values.max()) + 1 for name, rows in self.features.items()}

    @cached_property
    def hash(self) -> str:
        """Hash of the item ids in index order. Catalogs with the same hash have the same item at each index."""
        starts = range(0, self.num_items, _HASHED_VALUES)
        return hash_item_ids(self.item_ids.slice(start, _HASHED_VALUES) for start in starts)

    @property
    def item_ids(self) -> pa.Array:
        """Raw ids, string or int64; element i belongs to item index i."""
        if self._item_ids is None:
            self._item_ids = read_ids(self.file)
        return self._item_ids

    def forget_ids(self) -> None:
        """Frees the ids, which training does not need. They are read from the file again where they are used."""
        # Kept, since it is computed from them.
        _ = self.hash
        self._item_ids = None

    @cached_property
    def features_hash(self) -> str:
        """Hash of the item ids and side features. With the same hash, the rows of all embedding tables mean the same.

        `hash` is not enough for that: preparing a data set again may give words, brands and categories other ids.
        """
        digest = hashlib.sha256(self.hash.encode())
        for name, rows in sorted(self.features.items()):
            digest.update(name.encode() + b"\0")
            for tensor in (rows.offsets, rows.values):
                # As int64, which catalogs of earlier versions were in.
                for part in tensor.split(_HASHED_VALUES):
                    digest.update(part.to(torch.int64).contiguous().numpy().data)
        return digest.hexdigest()

    def titles(self) -> list[str | None]:
        """Title of each item; None for an item without a title."""
        return self.column("title").to_pylist()

    def column(self, name: str) -> pa.Array:
        """A text column of the catalog, as it is in the file.

        Args:
            name: title, category, brand or description.

        Raises:
            UserError: The file has no such column.
        """
        return one_array(_read(self.file, [name])[name])

    def in_category(self, category: str) -> np.ndarray:
        """Mask of the items of a category or of one below it, bool [V].

        Args:
            category: Name, with the levels above it as in the item file: `Tools > Saws`.

        Raises:
            UserError: No item has this category, or it is no text.
        """
        if not isinstance(category, str):
            raise UserError(f"category is {category!r}; give the name of one category")
        names = _read(self.file, ["category"])["category"]
        below = pc.starts_with(names, f"{category} > ")
        mask = pc.fill_null(pc.or_(pc.equal(names, category), below), False).to_numpy()
        if not mask.any():
            known = [name for name in names.unique().to_pylist() if name]
            if not known:
                raise UserError(f"category is {category!r}, but no item of the catalog has a category")
            raise UserError(f"no item has the category {category!r}{did_you_mean(category, known)}")
        return mask

    def texts(self, fields: list[str], required: bool = True) -> list[str]:
        """Text of each item: the non-empty text columns, joined by commas.

        Args:
            fields: Text columns in the order in which they are joined.
            required: Whether an item without text is an error; otherwise its text is empty.

        Raises:
            UserError: `fields` is empty or names an unknown column, or an item has no text and `required` is true.
        """
        if required:
            self.require_texts(fields)
        _check_fields(fields)
        return _joined(_read(self.file, fields), fields).to_pylist()

    def require_texts(self, fields: list[str]) -> None:
        """Checks that each item has a text, reading a part of the texts at a time.

        Args:
            fields: Text columns, as for `texts`.

        Raises:
            UserError: `fields` is empty or names an unknown column, or an item has no text.
        """
        texts = itertools.chain.from_iterable(self.text_batches(fields, range(self.num_items)))
        missing = [item for item, text in enumerate(texts) if not text]
        if missing:
            raise UserError(
                f"{self.file}: {len(missing)} items have no text in {', '.join(fields)}, the first is item_id "
                f"{self.item_ids[missing[0]].as_py()!r}; give them text or name more columns in prompt.text_fields"
            )

    def text_batches(self, fields: list[str], items: range) -> Iterator[list[str]]:
        """Texts of a range of items as `texts` has them, in batches; may be empty.

        Args:
            fields: Text columns in the order in which they are joined.
            items: The items.

        Raises:
            UserError: `fields` is empty or names an unknown column.
        """
        _check_fields(fields)
        require_columns(self.file, fields)
        with readable(self.file), pq.ParquetFile(self.file) as parquet:
            first = 0
            for number in range(parquet.num_row_groups):
                end = first + parquet.metadata.row_group(number).num_rows
                start, stop = max(items.start, first), min(items.stop, end)
                if start < stop:
                    group = parquet.read_row_group(number, fields)
                    yield _joined(group.slice(start - first, stop - start), fields).to_pylist()
                first = end

    def index_of(self, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Item index of each raw id, int64; -1 for unknown ids and nulls.

        The text `12`, the integer 12 and the float 12.0 are the same id, and so is the text `12.0`.

        The first call sorts the catalog; each one is a binary search.

        Args:
            ids: Raw ids: text, integers of any width, or whole floats.

        Raises:
            UserError: The ids have another type, or a float is not an exact integer.
        """
        array = one_array(ids)
        if not are_ids(array.type):
            raise UserError(f"item ids are {ids.type}, but must be text or integers; cast them")
        if pa.types.is_string(self.item_ids.type):
            text = array if is_text(array.type) else int64_ids(array)
            return self._index_of_text(text.cast(pa.large_string()))
        queries = int64_ids(array)
        sorted_ids, order = self._search_order
        values = queries.fill_null(0).to_numpy()
        positions = np.minimum(np.searchsorted(sorted_ids, values), len(order) - 1)
        is_known = (sorted_ids[positions] == values) & queries.is_valid().to_numpy(zero_copy_only=False)
        return np.where(is_known, order[positions], -1)

    def _index_of_text(self, ids: pa.Array) -> np.ndarray:
        indices = self._text_index.positions(ids)
        unknown = np.flatnonzero(indices < 0)
        if not len(unknown):
            return indices
        as_given = ids.take(pa.array(unknown))
        plain = plain_ids(as_given)
        if not plain.equals(as_given):
            indices[unknown] = self._text_index.positions(plain)
        return indices

    @cached_property
    def _text_index(self) -> TextIndex:
        # Offsets of 64 bits, because those of a query may need them.
        return TextIndex(self.item_ids.cast(pa.large_string()))

    @cached_property
    def _search_order(self) -> tuple[np.ndarray, np.ndarray]:
        ids = self.item_ids.to_numpy()
        order = np.argsort(ids)
        return ids[order], order


def _check_fields(fields: list[str]) -> None:
    if not fields:
        raise UserError(f"prompt.text_fields is empty; name one or more of {', '.join(TEXT_COLUMNS)}")
    if unknown := sorted(set(fields) - set(TEXT_COLUMNS)):
        raise UserError(f"prompt.text_fields names {', '.join(unknown)}; choose from {', '.join(TEXT_COLUMNS)}")


def _joined(table: pa.Table, fields: list[str]) -> pa.ChunkedArray:
    """The non-empty texts of each row, joined by commas."""
    columns = [pc.utf8_trim_whitespace(table[name]).fill_null("") for name in fields]
    # Not null_handling="skip": pyarrow 26 then drops the rows in which every column is null.
    separated = [
        pc.if_else(pc.equal(column, ""), "", pc.binary_join_element_wise(_TEXT_SEPARATOR, column, ""))
        for column in columns
    ]
    return pc.utf8_slice_codeunits(pc.binary_join_element_wise(*separated, ""), start=len(_TEXT_SEPARATOR))


def _read(file: Path, columns: list[str]) -> pa.Table:
    require_columns(file, columns)
    # Not read_table, which imports pyarrow.dataset.
    with readable(file), pq.ParquetFile(file) as parquet:
        return parquet.read(columns)
