"""Input of a scoring job: Parquet files of sessions, split into parts that are scored one by one.

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
# A folder with this file is a scoring output, whose files are not input.
MANIFEST_NAME = "_manifest.json"

_CACHED_GROUPS = 2


@dataclass(frozen=True)
class InputFile:
    """One Parquet file of sessions.

    Args:
        path: Path of the file.
        name: Path relative to the input folder.
        group_rows: Number of rows of each row group.
        has_indices: Whether the column `items` contains item indices, as in prepared data sets; otherwise raw item ids.
    """

    path: Path
    name: str
    group_rows: tuple[int, ...]
    has_indices: bool

    @property
    def rows(self) -> int:
        """Number of rows of the file."""
        return sum(self.group_rows)

    def sha256(self) -> str:
        """Hexadecimal hash of the content."""
        with self.path.open("rb") as file:
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
    """

    table: pa.Table
    items_L: Ints
    offsets: Ints
    unknown_items: int


class SessionFiles:
    """The input of a scoring job. The constructor reads and checks the file footers.

    Args:
        path: A Parquet file, or a folder with Parquet files at any depth. Files and folders whose names begin with `.`
            or `_` are ignored.
        columns: Input columns that are copied to the output, `session_id` first.
        catalog: Catalog of the model.
        unknown_items: Whether clicks on unknown items are skipped or an error.

    Raises:
        UserError: There are no sessions, a file is unreadable, or a column is missing or has a wrong type.
    """

    def __init__(self, path: Path, columns: Sequence[str], catalog: Catalog, unknown_items: UnknownItems) -> None:
        self.columns = list(columns)
        self._catalog = catalog
        self._unknown_items = unknown_items
        self._schema: pa.Schema | None = None
        self.files = [self._open(file, name) for file, name in _find_files(path)]
        if not self.rows:
            raise UserError(
                f"{path} has no sessions: its {len(self.files)} Parquet files have no rows; give sessions to score"
            )
        self._group = lru_cache(maxsize=_CACHED_GROUPS)(self._read_group)

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
            on_rows: Called after each row group with its number of rows.

        Raises:
            UserError: There is a null, an index out of range or, if that is an error, an unknown item.
        """
        for file in self.files:
            for number, rows in enumerate(file.group_rows):
                self._decode(file, number, self._read_group(file, number))
                on_rows(rows)

    def read(self, part: Part) -> PartSessions:
        """Reads the sessions of a part.

        Raises:
            UserError: As from `check`.
        """
        slices = [(group, table.slice(start, stop - start)) for group, table, start, stop in self._slices(part)]
        decoded = [self._decode(part.file, group, table) for group, table in slices]
        lengths = np.concatenate([np.diff(offsets) for _, offsets, _ in decoded])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        items = np.concatenate([items for items, _, _ in decoded])
        table = pa.concat_tables([table.select(self.columns) for _, table in slices]).combine_chunks()
        return PartSessions(table, items, offsets, sum(unknown for _, _, unknown in decoded))

    def _slices(self, part: Part) -> Iterator[tuple[int, pa.Table, int, int]]:
        """Row groups of a part: number, content, and the first and last + 1 row that belong to the part."""
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
            raise UserError(f"{path} is truncated or not a Parquet file ({reason}); write it again") from None
        schema = metadata.schema.to_arrow_schema()
        for column in (ITEMS, *self.columns):
            if column not in schema.names:
                raise UserError(f"{path} has no column {column}{did_you_mean(column, schema.names)}")
            if len(schema.get_all_field_indices(column)) > 1:
                raise UserError(f"{path} has more than one column {column}; keep one of them")
        has_indices = (schema.metadata or {}).get(ITEMS_KIND_KEY) == ITEMS_KIND_INDEX
        # Some writers give the columns of a file without rows no types.
        if metadata.num_rows:
            self._check_types(schema, path, has_indices)
        group_rows = tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
        return InputFile(path, name, group_rows, has_indices)

    def _check_types(self, schema: pa.Schema, path: Path, has_indices: bool) -> None:
        items_type = schema.field(ITEMS).type
        if not isinstance(items_type, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
            raise UserError(f"{path}: column {ITEMS} is {items_type}, not a list of item ids; write it as a list")
        if has_indices:
            catalog_hash = schema.metadata.get(CATALOG_HASH_KEY, b"").decode()
            if catalog_hash != self._catalog.hash:
                raise UserError(
                    f"{path} has item indices of another catalog ({catalog_hash[:12]}, the model's is "
                    f"{self._catalog.hash[:12]}); score the data set that the model was trained on, or raw item ids"
                )
        else:
            self._check_id_type(items_type.value_type, path)
        columns = pa.schema([schema.field(column) for column in self.columns])
        self._schema = self._schema or columns
        for first, column in zip(self._schema, columns, strict=True):
            if first.type != column.type:
                raise UserError(
                    f"{path}: column {column.name} is {column.type}, but {first.type} in the files before; "
                    "write it as one type in all files"
                )

    def _check_id_type(self, id_type: pa.DataType, path: Path) -> None:
        try:
            self._catalog.index_of(pa.array([], type=id_type))
        except UserError:
            expected = self._catalog.item_ids.type
            raise UserError(
                f"{path}: column {ITEMS} has {id_type} ids, but the catalog's item ids are {expected}; "
                f"cast them to {expected}"
            ) from None

    def _read_group(self, file: InputFile, number: int) -> pa.Table:
        columns = list(dict.fromkeys([ITEMS, *self.columns]))
        try:
            with pq.ParquetFile(file.path) as parquet:
                return parquet.read_row_group(number, columns=columns, use_threads=False).select(columns)
        except (pa.ArrowInvalid, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{file.path}, row group {number}: unreadable ({reason}); write it again") from None

    def _decode(self, file: InputFile, group: int, table: pa.Table) -> tuple[Ints, Ints, int]:
        """Item indices, session offsets and number of unknown items of rows of a row group."""
        where = f"{file.path}, row group {group}"
        for column in (SESSION_ID, ITEMS):
            if table[column].null_count:
                fix = "write an empty list for a session without clicks" if column == ITEMS else "give every row an id"
                raise UserError(f"{where}: column {column} has {table[column].null_count} nulls; {fix}")
        lists = table[ITEMS].combine_chunks()
        if isinstance(lists.type, pa.FixedSizeListType):
            lists = lists.cast(pa.list_(lists.type.value_type))
        offsets = np.asarray(lists.offsets, dtype=np.int64)
        # The values of a sliced list array include those outside of the slice.
        clicks = lists.values.slice(offsets[0], offsets[-1] - offsets[0])
        offsets = offsets - offsets[0]
        if clicks.null_count:
            raise UserError(f"{where}: column {ITEMS} has {clicks.null_count} null item ids; remove them")
        if file.has_indices:
            return self._checked_indices(np.array(clicks, dtype=np.int64), where), offsets, 0
        items = self._catalog.index_of(clicks)
        known = items >= 0
        if self._unknown_items == "error" and not known.all():
            first = clicks[int(np.argmin(known))].as_py()
            raise UserError(
                f"{where}: column {ITEMS} has {int((~known).sum())} items that are not in the catalog, the first is "
                f"{first!r}; remove them, or pass --unknown_items skip"
            )
        known_before = np.concatenate([[0], np.cumsum(known)])
        return items[known], known_before[offsets], int((~known).sum())

    def _checked_indices(self, items: Ints, where: str) -> Ints:
        if len(items) and (items.min() < 0 or items.max() >= self._catalog.num_items):
            wrong = items.min() if items.min() < 0 else items.max()
            raise UserError(
                f"{where}: column {ITEMS} has item index {wrong}, but the catalog has items 0 to "
                f"{self._catalog.num_items - 1}; prepare the data set again with python -m llmgr_rec.prepare"
            )
        return items


def _find_files(path: Path) -> list[tuple[Path, str]]:
    """Parquet files with their paths relative to the input folder, sorted."""
    if path.is_file():
        return [(path, path.name)]
    if not path.exists():
        raise UserError(f"--input {path} does not exist; give a Parquet file or a folder of Parquet files")
    found = [
        (file, file.relative_to(path).as_posix())
        for file in sorted(path.rglob("*.parquet"))
        if file.is_file() and not any(step.startswith((".", "_")) for step in file.relative_to(path).parts)
        # An earlier scoring output may be a folder inside of the input folder.
        if not (file.parent / MANIFEST_NAME).is_file()
    ]
    if not found:
        raise UserError(f"--input {path} has no .parquet files; give a Parquet file or a folder of Parquet files")
    return found
