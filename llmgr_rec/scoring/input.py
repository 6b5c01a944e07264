"""Input of a scoring job: Parquet files of sessions, split into parts that are scored one by one.

Shapes: R rows of a part, L clicks of its sessions.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.parquet_files import ParquetFile, list_parquet_files
from llmgr_rec.data.parquet_footer import read_footer
from llmgr_rec.data.schema import CATALOG_HASH_KEY, has_item_indices
from llmgr_rec.errors import UserError, did_you_mean
from llmgr_rec.remote_path import open_sequential
from llmgr_rec.scoring.blocks import Block, read_blocks
from llmgr_rec.scoring.click_lists import Ints, flat_clicks, known_clicks
from llmgr_rec.scoring.common_schema import CommonSchema

logger = logging.getLogger(__name__)

UnknownItems = Literal["skip", "error"]

SESSION_ID = "session_id"
ITEMS = "items"
# A folder with this file is a scoring output, whose files are not input.
MANIFEST_NAME = "_manifest.json"

# How a log with one click a row becomes sessions.
_AS_SESSIONS = (
    ", a list of item ids a session, oldest first; DuckDB makes it of clicks by: SELECT user_id AS session_id, "
    "list(item_id ORDER BY timestamp) AS items FROM 'clicks.parquet' GROUP BY user_id"
)
# Ids in a message.
_EXAMPLES = 3
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")


@dataclass(frozen=True)
class InputFile:
    """One Parquet file of sessions.

    Args:
        path: Path of the file.
        name: Path relative to the input folder.
        group_rows: Number of rows of each row group.
        has_indices: Whether the column `items` contains item indices, as in prepared data sets; otherwise raw item ids.
        partitions: Columns to copy that the file does not have, from the names of its folders.
        version: Size and time of the last change when the file was opened.
    """

    path: Path
    name: str
    group_rows: tuple[int, ...]
    has_indices: bool
    partitions: dict[str, pa.Scalar]
    version: tuple[int, int] | None = None

    @property
    def rows(self) -> int:
        """Number of rows of the file."""
        return sum(self.group_rows)

    def check_unchanged(self) -> None:
        """Raises a `UserError` if the file has changed since it was opened."""
        if self.version != _version(self.path):
            raise UserError(
                f"{self.path} has changed since the job began, which has read the former content; "
                "restore it and run again, or score the new content to another --output"
            )

    def sha256(self) -> str:
        """Hexadecimal hash of the content."""
        with open_sequential(self.path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one input file that become one output file.

    Args:
        name: Name of the output file.
        file: The input file.
        first_row: First row in the input file.
        rows: Number of rows.
    """

    name: str
    file: InputFile
    first_row: int
    rows: int


@dataclass(frozen=True)
class PartSessions:
    """The sessions of a part.

    Args:
        table: Input columns that are copied to the output, R rows.
        items_L: Item index of each click on a known item, oldest first.
        offsets: First click of each session, [R + 1]; a session may be empty.
        unknown_items: Number of clicks on unknown items, which are not in `items_L`.
        consecutive_repeats: Number of clicks on the item clicked just before, which are not in `items_L`.
        domain_R: Place of the domain of each session, known items or not; see `ItemDomains.of_ids`. None for a catalog
            of one log.
    """

    table: pa.Table
    items_L: Ints
    offsets: Ints
    unknown_items: int
    consecutive_repeats: int = 0
    domain_R: Ints | None = None

    def without_consecutive_repeats(self) -> "PartSessions":
        """The sessions with clicks in a row on the same item merged into one."""
        clicks = Jagged(torch.from_numpy(self.items_L), torch.from_numpy(self.offsets)).without_consecutive_repeats()
        merged = len(self.items_L) - clicks.values.numel()
        return replace(self, items_L=clicks.values.numpy(), offsets=clicks.offsets.numpy(), consecutive_repeats=merged)


class SessionFiles:
    """The input of a scoring job. The constructor reads and checks the file footers.

    Files without rows may have any columns, because some writers give those no types.

    Args:
        path: A Parquet file, or a folder with Parquet files at any depth; see `list_parquet_files`.
        columns: Input columns that are copied to the output, `session_id` first. A column that a file does not have may
            come from the name of its folder, such as `dt=2026-11-01`.
        catalog: Catalog of the model.
        unknown_items: Whether clicks on unknown items are skipped or an error.

    Raises:
        UserError: There are no sessions, a file is unreadable, or a column is missing or has a wrong type.
    """

    def __init__(self, path: Path, columns: Sequence[str], catalog: Catalog, unknown_items: UnknownItems) -> None:
        self.columns = list(columns)
        self._catalog = catalog
        self._unknown_items = unknown_items
        self._unknown_examples: list[str | int] = []
        self._schema = CommonSchema(frozenset([SESSION_ID]))
        listing = list_parquet_files(path, "input", MANIFEST_NAME)
        self.description = listing.describe()
        partition_types = self._partition_types(listing.files)
        self.files = [self._open(file, partition_types) for file in listing.files]
        if not self.rows:
            raise UserError(
                f"{path} has no sessions: its {len(self.files)} Parquet files have no rows; give sessions to score"
            )
        # The reader of the part that was read last continues with the next one.
        self._reader: tuple[InputFile, Iterator[Block], Block | None] | None = None

    @property
    def rows(self) -> int:
        """Number of rows of all files."""
        return sum(file.rows for file in self.files)

    def parts(self, part_rows: int) -> list[Part]:
        """Splits every file into parts.

        Args:
            part_rows: Rows of a part; the last part of a file may be shorter.
        """
        slices = [
            (file, first, min(part_rows, file.rows - first))
            for file in self.files
            for first in range(0, file.rows, part_rows)
        ]
        return [Part(f"part-{number:05d}.parquet", *rows) for number, rows in enumerate(slices)]

    def check(self, on_rows: Callable[[int], object]) -> None:
        """Reads and checks all rows, so that an invalid row ends the job before anything is written.

        Args:
            on_rows: Called after each block of rows with its size.

        Raises:
            UserError: There is a null, an index out of range or, if that is an error, an unknown item, or a value does
                not fit the type of its column in other files.
        """
        known = unknown = 0
        for file in self.files:
            for block in self._blocks(file, 0):
                _check_encoding(block.table, f"{file.path}, row group {block.group}")
                items, _, skipped = self._decode(file, block.group, block.table)
                known, unknown = known + len(items), unknown + skipped
                self._copied(file, block.group, block.table)
                on_rows(block.table.num_rows)
        if unknown > known:
            logger.warning(
                "only %s of %s clicks are on items that the model knows: the input has %s, the model %s; "
                "check that both name items alike",
                f"{known:,}",
                f"{known + unknown:,}",
                ", ".join(map(repr, self._unknown_examples)),
                ", ".join(map(repr, self._catalog.item_ids[:_EXAMPLES].to_pylist())),
            )

    def read(self, part: Part) -> PartSessions:
        """Reads the sessions of a part.

        Raises:
            UserError: As from `check`, or the file has changed since it was opened.
        """
        slices = list(self._slices(part))
        decoded = [self._decode(part.file, group, table) for group, table in slices]
        lengths = np.concatenate([np.diff(offsets) for _, offsets, _ in decoded])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        items = np.concatenate([items for items, _, _ in decoded])
        table = pa.concat_tables([self._copied(part.file, group, table) for group, table in slices])
        part.file.check_unchanged()
        unknown = sum(count for _, _, count in decoded)
        return PartSessions(table, items, offsets, unknown, domain_R=self._domains(part.file, slices))

    def _domains(self, file: InputFile, slices: list[tuple[int, pa.Table]]) -> Ints | None:
        domains = self._catalog.domains
        if domains is None or file.has_indices:
            return None
        return np.concatenate([domains.of_ids(*flat_clicks(table[ITEMS])[:2]) for _, table in slices])

    def _slices(self, part: Part) -> Iterator[tuple[int, pa.Table]]:
        """Rows of a part block by block, with their row groups. Parts in order are read without reading a row twice."""
        row, end = part.first_row, part.first_row + part.rows
        file, blocks, block = self._reader or (None, iter(()), None)
        if file is not part.file or block is None or block.first_row > row:
            blocks, block = self._blocks(part.file, row), None
        while row < end:
            if block is None or block.end <= row:
                block = next(blocks)
                continue
            yield block.group, block.table.slice(row - block.first_row, end - row)
            row = min(block.end, end)
        self._reader = part.file, blocks, block

    def _blocks(self, file: InputFile, first_row: int) -> Iterator[Block]:
        columns = [name for name in dict.fromkeys([ITEMS, *self.columns]) if name not in file.partitions]
        return read_blocks(file.path, file.group_rows, columns, first_row)

    def _copied(self, file: InputFile, group: int, table: pa.Table) -> pa.Table:
        """The columns that are copied to the output, in their common types."""
        for name, value in file.partitions.items():
            table = table.append_column(name, pa.repeat(value, table.num_rows))
        where = f"{file.path}, row group {group}"
        copied = self._schema.conform(table, where)
        if nulls := copied[SESSION_ID].null_count:
            raise UserError(f"{where}: column {SESSION_ID} has {nulls} nulls; give every row an id")
        return copied

    def _partition_types(self, files: Sequence[ParquetFile]) -> dict[str, pa.DataType]:
        """Types of columns that come from folder names: int64 if all values are integers, otherwise string."""
        values = {name: [file.partitions.get(name) for file in files] for name in self.columns}
        return {
            name: pa.int64() if all(_INTEGER.fullmatch(value) for value in found if value is not None) else pa.string()
            for name, found in values.items()
        }

    def _open(self, file: ParquetFile, partition_types: dict[str, pa.DataType]) -> InputFile:
        version, footer = _version(file.path), read_footer(file.path, "input")
        if not sum(footer.group_rows):
            return InputFile(file.path, file.name, footer.group_rows, has_indices=False, partitions={})
        schema = footer.schema
        partitions: dict[str, pa.Scalar] = {}
        for column in (ITEMS, *self.columns):
            if column not in footer.names and column in file.partitions and column != ITEMS:
                value = file.partitions[column]
                partitions[column] = pa.scalar(value, pa.string()).cast(partition_types[column])
            elif column not in footer.names:
                known = [*footer.names, *file.partitions]
                is_log = column == ITEMS and {"user_id", "session_id"} & set(known)
                remedy = _AS_SESSIONS if is_log else did_you_mean(column, known)
                raise UserError(f"{file.path} has no column {column}{remedy}")
            elif len(schema.get_all_field_indices(column)) > 1:
                raise UserError(f"{file.path} has more than one column {column}; keep one of them")
        has_indices = has_item_indices(schema)
        self._check_items_type(schema, file.path, has_indices)
        types = {
            name: partitions[name].type if name in partitions else schema.field(name).type for name in self.columns
        }
        self._schema.add(file.path, types)
        return InputFile(file.path, file.name, footer.group_rows, has_indices, partitions, version)

    def _check_items_type(self, schema: pa.Schema, path: Path, has_indices: bool) -> None:
        items_type = schema.field(ITEMS).type
        if not _is_list(items_type):
            raise UserError(f"{path}: column {ITEMS} is {items_type}, not a list of item ids; write it as a list")
        if not has_indices:
            self._check_id_type(items_type.value_type, path)
            return
        catalog_hash = schema.metadata.get(CATALOG_HASH_KEY, b"").decode()
        if catalog_hash != self._catalog.hash:
            raise UserError(
                f"{path} has item indices of another catalog ({catalog_hash[:12]}, the model's is "
                f"{self._catalog.hash[:12]}); score the data set that the model was trained on, or raw item ids"
            )

    def _check_id_type(self, id_type: pa.DataType, path: Path) -> None:
        try:
            self._catalog.index_of(pa.array([], type=id_type))
        except UserError:
            raise UserError(
                f"{path}: column {ITEMS} has {id_type} ids, but ids are text or integers; cast them to "
                f"{self._catalog.item_ids.type}"
            ) from None

    def _decode(self, file: InputFile, group: int, table: pa.Table) -> tuple[Ints, Ints, int]:
        """Item indices, session offsets and number of unknown items of rows of a row group."""
        where = f"{file.path}, row group {group}"
        if nulls := table[ITEMS].null_count:
            raise UserError(
                f"{where}: column {ITEMS} has {nulls} nulls; write an empty list for a session without clicks"
            )
        clicks, offsets, nulls = flat_clicks(table[ITEMS])
        if nulls:
            raise UserError(f"{where}: column {ITEMS} has {nulls} null item ids; remove them")
        if file.has_indices:
            return self._checked_indices(np.array(clicks, dtype=np.int64), where), offsets, 0
        try:
            items = self._catalog.index_of(clicks)
        except UserError as error:
            raise UserError(f"{where}: column {ITEMS}: {error}") from None
        known = items >= 0
        if len(self._unknown_examples) < _EXAMPLES:
            examples = [clicks[row].as_py() for row in np.flatnonzero(~known)[:_EXAMPLES].tolist()]
            self._unknown_examples = [*self._unknown_examples, *examples][:_EXAMPLES]
        if self._unknown_items == "error" and not known.all():
            first = clicks[int(np.argmin(known))].as_py()
            raise UserError(
                f"{where}: column {ITEMS} has {int((~known).sum())} items that are not in the catalog, the first is "
                f"{first!r}; remove them, or pass --unknown_items skip"
            )
        return *known_clicks(items, offsets), int((~known).sum())

    def _checked_indices(self, items: Ints, where: str) -> Ints:
        if len(items) and (items.min() < 0 or items.max() >= self._catalog.num_items):
            wrong = items.min() if items.min() < 0 else items.max()
            raise UserError(
                f"{where}: column {ITEMS} has item index {wrong}, but the catalog has items 0 to "
                f"{self._catalog.num_items - 1}; prepare the data set again with python -m llmgr_rec.prepare"
            )
        return items


def _version(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _check_encoding(table: pa.Table, where: str) -> None:
    """Raises a `UserError` if text is not UTF-8, which neither this program nor a reader of its output can show."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{where}: column {name} is damaged or not UTF-8 ({reason}); write it again") from None


def _is_list(found: pa.DataType) -> bool:
    types = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)
    return isinstance(found, types)
