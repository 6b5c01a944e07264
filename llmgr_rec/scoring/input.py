"""Sessions to score: Parquet files of any writer, cut into parts that are read, scored and written one by one.

Shapes: R rows of a part, L clicks of its sessions.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.schema import CATALOG_HASH_KEY, ITEMS_KIND_INDEX, ITEMS_KIND_KEY
from llmgr_rec.errors import UserError, did_you_mean

Ints = NDArray[np.int64]
UnknownItems = Literal["skip", "error"]

SESSION_ID = "session_id"
ITEMS = "items"
# Marks a folder of scores, whose files are no input.
MANIFEST_NAME = "_manifest.json"

_CACHED_GROUPS = 2


@dataclass(frozen=True)
class InputFile:
    """One Parquet file of sessions.

    Args:
        path: Where it is.
        name: Its path within the input folder.
        group_rows: Rows of each row group.
        holds_indices: Whether `items` holds item indices, as in prepared data sets, or raw item ids.
    """

    path: Path
    name: str
    group_rows: tuple[int, ...]
    holds_indices: bool

    @property
    def rows(self) -> int:
        """Rows of the file."""
        return sum(self.group_rows)

    def sha256(self) -> str:
        """Hash of the file's bytes."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one input file that become one output file.

    Args:
        name: Name of the output file.
        file: Where the rows are.
        first_row: First row within the file.
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
        table: Columns that go into the output as they are, R rows.
        items_L: Item index of each known click, oldest first.
        offsets: First click of each session, [R + 1]; a session may be empty.
        unknown_items: Clicks on items that the catalog lacks; they are left out.
    """

    table: pa.Table
    items_L: Ints
    offsets: Ints
    unknown_items: int


class SessionFiles:
    """The input of a scoring job.

    Args:
        path: A Parquet file, or a folder with some at any depth; names that begin with `.` or `_` are passed over.
        columns: Input columns that go into the output, `session_id` first.
        catalog: Items of the model.
        unknown_items: Whether a click on an unknown item is left out or an error.

    Raises:
        UserError: No sessions, an unreadable file, or a column that is absent or of the wrong type.
    """

    def __init__(self, path: Path, columns: Sequence[str], catalog: Catalog, unknown_items: UnknownItems) -> None:
        self.columns = list(columns)
        self._catalog = catalog
        self._unknown_items = unknown_items
        self._schema: pa.Schema | None = None
        self.files = [self._open(file, name) for file, name in _find_files(path)]
        if not self.rows:
            raise UserError(f"{path} holds no sessions: its {len(self.files)} Parquet files have no rows")
        self._group = lru_cache(maxsize=_CACHED_GROUPS)(self._read_group)

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files)

    def parts(self, part_rows: int) -> list[Part]:
        """Cuts every file into parts.

        Args:
            part_rows: Rows of a part; the last one of a file may be shorter.
        """
        places = [
            (file, first, min(part_rows, file.rows - first))
            for file in self.files
            for first in range(0, file.rows, part_rows)
        ]
        return [Part(f"part-{number:05d}.parquet", *place) for number, place in enumerate(places)]

    def check(self, on_rows: Callable[[int], object]) -> None:
        """Reads everything once, so that a bad row stops the job before it has written anything.

        Args:
            on_rows: Told of the rows just checked.

        Raises:
            UserError: A null, an index out of range or, if that is an error, an unknown item.
        """
        for file in self.files:
            for number, rows in enumerate(file.group_rows):
                self._decode(file, number, self._read_group(file, number))
                on_rows(rows)

    def read(self, part: Part) -> PartSessions:
        """Reads a part."""
        pieces = [
            (file_group, table.slice(start, stop - start)) for file_group, table, start, stop in self._slices(part)
        ]
        decoded = [self._decode(part.file, group, table) for group, table in pieces]
        lengths = np.concatenate([np.diff(offsets) for _, offsets, _ in decoded])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        items = np.concatenate([items for items, _, _ in decoded])
        table = pa.concat_tables([table.select(self.columns) for _, table in pieces]).combine_chunks()
        return PartSessions(table, items, offsets, sum(unknown for _, _, unknown in decoded))

    def _slices(self, part: Part) -> Iterator[tuple[int, pa.Table, int, int]]:
        """Row groups that a part touches, and which of their rows belong to it."""
        first = 0
        for number, rows in enumerate(part.file.group_rows):
            start, stop = max(part.first_row - first, 0), min(part.first_row + part.rows - first, rows)
            if start < stop:
                yield number, self._group(part.file, number), start, stop
            first += rows

    def _open(self, path: Path, name: str) -> InputFile:
        try:
            metadata = pq.read_metadata(path)
        except (pa.ArrowInvalid, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is truncated or no Parquet file ({reason}); write it again") from None
        schema = metadata.schema.to_arrow_schema()
        for column in (ITEMS, *self.columns):
            if column not in schema.names:
                raise UserError(f"{path} has no column {column}{did_you_mean(column, schema.names)}")
            if len(schema.get_all_field_indices(column)) > 1:
                raise UserError(f"{path} has more than one column {column}; keep one of them")
        holds_indices = (schema.metadata or {}).get(ITEMS_KIND_KEY) == ITEMS_KIND_INDEX
        # A file without rows may well have been written without types.
        if metadata.num_rows:
            self._check_types(schema, path, holds_indices)
        group_rows = tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
        return InputFile(path, name, group_rows, holds_indices)

    def _check_types(self, schema: pa.Schema, path: Path, holds_indices: bool) -> None:
        kind = schema.field(ITEMS).type
        if not isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
            raise UserError(f"{path}: column {ITEMS} is {kind}, not a list of item ids")
        if holds_indices:
            theirs = schema.metadata.get(CATALOG_HASH_KEY, b"").decode()
            if theirs != self._catalog.hash:
                raise UserError(
                    f"{path} holds item indices of another catalog ({theirs[:12]}, the model's is "
                    f"{self._catalog.hash[:12]}); score the data set that the model was trained on, or raw item ids"
                )
        else:
            self._catalog_takes(kind.value_type, path)
        chosen = pa.schema([schema.field(column) for column in self.columns])
        self._schema = self._schema or chosen
        for ours, now in zip(self._schema, chosen, strict=True):
            if ours.type != now.type:
                raise UserError(
                    f"{path}: column {now.name} is {now.type}, but {ours.type} in the files before; "
                    "write it as one type in all files"
                )

    def _catalog_takes(self, kind: pa.DataType, path: Path) -> None:
        try:
            self._catalog.index_of(pa.array([], type=kind))
        except UserError:
            known = self._catalog.item_ids.type
            raise UserError(
                f"{path}: column {ITEMS} holds {kind}, but the catalog's item ids are {known}; cast them to {known}"
            ) from None

    def _read_group(self, file: InputFile, number: int) -> pa.Table:
        wanted = list(dict.fromkeys([ITEMS, *self.columns]))
        try:
            with pq.ParquetFile(file.path) as parquet:
                return parquet.read_row_group(number, columns=wanted, use_threads=False).select(wanted)
        except (pa.ArrowInvalid, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{file.path}, row group {number}: unreadable ({reason}); write it again") from None

    def _decode(self, file: InputFile, group: int, table: pa.Table) -> tuple[Ints, Ints, int]:
        """Item indices, offsets and the number of unknown items of rows of a row group."""
        where = f"{file.path}, row group {group}"
        for column in (SESSION_ID, ITEMS):
            if table[column].null_count:
                remedy = "write an empty list where nothing was clicked" if column == ITEMS else "give every row one"
                raise UserError(f"{where}: column {column} holds {table[column].null_count} nulls; {remedy}")
        lists = table[ITEMS].combine_chunks()
        if isinstance(lists.type, pa.FixedSizeListType):
            lists = lists.cast(pa.list_(lists.type.value_type))
        offsets = np.asarray(lists.offsets, dtype=np.int64)
        # The values of a sliced list array include what lies outside of the slice.
        clicks = lists.values.slice(offsets[0], offsets[-1] - offsets[0])
        offsets = offsets - offsets[0]
        if clicks.null_count:
            raise UserError(f"{where}: column {ITEMS} holds {clicks.null_count} null item ids; leave them out")
        if file.holds_indices:
            return self._checked_indices(np.array(clicks, dtype=np.int64), where), offsets, 0
        items = self._catalog.index_of(clicks)
        known = items >= 0
        if self._unknown_items == "error" and not known.all():
            first = clicks[int(np.argmin(known))].as_py()
            raise UserError(
                f"{where}: column {ITEMS} holds {int((~known).sum())} items that the catalog lacks, the first is "
                f"{first!r}; leave them out, or pass --unknown_items skip"
            )
        before = np.concatenate([[0], np.cumsum(known)])
        return items[known], before[offsets], int((~known).sum())

    def _checked_indices(self, items: Ints, where: str) -> Ints:
        if len(items) and (items.min() < 0 or items.max() >= self._catalog.num_items):
            wrong = items.min() if items.min() < 0 else items.max()
            raise UserError(
                f"{where}: column {ITEMS} holds item index {wrong}, but the catalog has items 0 to "
                f"{self._catalog.num_items - 1}; make the data set again with python -m llmgr_rec.prepare"
            )
        return items


def _find_files(path: Path) -> list[tuple[Path, str]]:
    """Parquet files with their names within the input, in order of name."""
    if path.is_file():
        return [(path, path.name)]
    if not path.exists():
        raise UserError(f"--input {path} does not exist; give a Parquet file or a folder with some")
    found = [
        (file, file.relative_to(path).as_posix())
        for file in sorted(path.rglob("*.parquet"))
        if file.is_file() and not any(step.startswith((".", "_")) for step in file.relative_to(path).parts)
        # What was scored before may lie beside what it was scored from.
        if not (file.parent / MANIFEST_NAME).is_file()
    ]
    if not found:
        raise UserError(f"--input {path} holds no .parquet files; give a Parquet file or a folder with some")
    return found
