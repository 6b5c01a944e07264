"""Columns of items.parquet, read batch by batch into arrays of their final size.

A column that is read as a whole, its chunks in one piece and its tensor are three copies. Here only a batch of rows is
in memory beside the result.

Shapes: V items, R rows of a batch, S values of all rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.schema import ROW_GROUP_ROWS
from llmgr_rec.data.text_index import text_hashes
from llmgr_rec.errors import UserError

REMEDY = "prepare the data set again with python -m llmgr_rec.prepare"
_BATCH_ROWS = 8 * ROW_GROUP_ROWS
_INT_BYTES, _LONG_BYTES = 4, 8
_LONGEST_TEXT = _LARGEST_INT32 = 2**31 - 1


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turns errors of Arrow into one line.

    Args:
        file: The file that is read in the block.

    Raises:
        UserError: The file is not a readable Parquet file.
    """
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} is not a readable Parquet file ({str(error).splitlines()[0]}); {REMEDY}") from None


def column_names(file: Path) -> list[str]:
    """Names of the columns of a catalog.

    Args:
        file: items.parquet.

    Raises:
        UserError: The file is missing or unreadable.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist; {REMEDY}")
    with readable(file):
        return list(pq.read_schema(file).names)


def require_columns(file: Path, columns: list[str]) -> None:
    """Checks that a catalog has columns.

    Args:
        file: items.parquet.
        columns: Their names.

    Raises:
        UserError: The file lacks one, is missing or unreadable.
    """
    found = column_names(file)
    if missing := [name for name in columns if name not in found]:
        raise UserError(f"{file} has no column {', '.join(missing)}; {REMEDY}")


def one_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Combines the chunks of a column to one array and decodes dictionaries."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def read_ids(file: Path) -> pa.Array:
    """The raw ids of all items, string or int64, without nulls and duplicates.

    Args:
        file: items.parquet.

    Raises:
        UserError: The column has another type, nulls or duplicates, or the file is not readable.
    """
    texts = _Texts()
    numbers = []
    for batch_R in _batches(file, "item_id"):
        _refuse_nulls(batch_R, file, "item_id")
        if pa.types.is_string(batch_R.type):
            texts.append(batch_R, file)
        elif pa.types.is_int64(batch_R.type):
            numbers.append(batch_R)
        else:
            raise UserError(f"{file}: column item_id is {batch_R.type}, not string or int64; {REMEDY}")
    if not texts.num_texts and not numbers:
        raise UserError(f"{file}: the catalog is empty; {REMEDY}")
    ids_V = texts.array() if texts.num_texts else pa.concat_arrays(numbers)
    _refuse_duplicates(ids_V, file)
    return ids_V


def read_integers(file: Path, name: str) -> NDArray[np.int64]:
    """An integer column without nulls, int64 [V].

    Args:
        file: items.parquet.
        name: Name of the column.

    Raises:
        UserError: The column has another type or nulls, or the file is not readable.
    """
    values_V = np.empty(_num_rows(file), np.int64)
    first = 0
    for batch_R in _batches(file, name):
        values_V[first : first + len(batch_R)] = _integers(batch_R, file, name)
        first += len(batch_R)
    return values_V


def check_index(file: Path) -> None:
    """Checks that the column index counts the rows.

    Args:
        file: items.parquet.

    Raises:
        UserError: It does not, or the file is not readable.
    """
    first = 0
    for batch_R in _batches(file, "index"):
        if not np.array_equal(_integers(batch_R, file, "index"), np.arange(first, first + len(batch_R))):
            raise UserError(f"{file}: column index does not count 0, 1, 2, ... row by row; {REMEDY}")
        first += len(batch_R)


def read_lists(file: Path, name: str) -> Jagged:
    """A column of lists of ids, one row per item; null is an empty list.

    Args:
        file: items.parquet.
        name: Name of the column.

    Returns:
        The lists, with values in int32, and offsets, too, unless there are more values than int32 can count.

    Raises:
        UserError: The column has another type, or a null, negative or too large id, or the file is not readable.
    """
    # An upper bound: a null and an empty list have a place in the file, too. Unused memory is never touched.
    values_S = np.empty(_num_places(file, name), np.int32)
    offsets_V1 = np.zeros(_num_rows(file) + 1, np.int32 if len(values_S) <= _LARGEST_INT32 else np.int64)
    row = count = 0
    for batch_R in _batches(file, name):
        is_list = pa.types.is_list(batch_R.type) or pa.types.is_large_list(batch_R.type)
        if not (is_list and pa.types.is_integer(batch_R.type.value_type)):
            raise UserError(f"{file}: column {name} is {batch_R.type}, not list<int64>; {REMEDY}")
        values = batch_R.flatten().cast(pa.int64())
        if values.null_count or (len(values) and pc.min(values).as_py() < 0):
            raise UserError(f"{file}: column {name} has a null or negative id; {REMEDY}")
        if len(values) and pc.max(values).as_py() > _LARGEST_INT32:
            raise UserError(f"{file}: column {name} has an id above {_LARGEST_INT32}; {REMEDY}")
        values_S[count : count + len(values)] = values.to_numpy()
        lengths_R = batch_R.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        offsets_V1[row + 1 : row + 1 + len(lengths_R)] = np.cumsum(lengths_R, dtype=np.int64) + count
        row, count = row + len(lengths_R), count + len(values)
    values_S.resize(count, refcheck=False)
    return Jagged(torch.from_numpy(values_S), torch.from_numpy(offsets_V1))


def read_categories(file: Path, name: str) -> pa.DictionaryArray:
    """A column of few different texts without nulls; the dictionary has them in the order of their first rows.

    Args:
        file: items.parquet.
        name: Name of the column.

    Raises:
        UserError: The column has nulls, or the file is not readable.
    """
    chunks = []
    for batch_R in _batches(file, name):
        _refuse_nulls(batch_R, file, name)
        chunks.append(batch_R.dictionary_encode())
    return pa.chunked_array(chunks).unify_dictionaries().combine_chunks()


def memory_of_columns(file: Path, features: Sequence[str]) -> int:
    """Bytes that the columns of a catalog take in memory without the ids, from the footer of the file.

    Args:
        file: items.parquet.
        features: Side features that at least one item has.

    Raises:
        UserError: The file is not readable.
    """
    lists = sum(_num_places(file, f"{name}_ids") + _num_rows(file) for name in features)
    return _LONG_BYTES * _num_rows(file) + _INT_BYTES * lists


def memory_of_ids(file: Path) -> int:
    """Bytes that the ids of a catalog take in memory, from the footer of the file.

    Args:
        file: items.parquet.

    Raises:
        UserError: The file is not readable.
    """
    # Text is stored with its lengths, whose offsets take as much in memory.
    return sum(column.total_uncompressed_size for column in _column_chunks(file, "item_id"))


def _batches(file: Path, name: str) -> Iterator[pa.Array]:
    """A column batch by batch, without dictionaries."""
    # Not read_table, which imports pyarrow.dataset.
    with readable(file), pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=[name]):
            yield one_array(batch.column(0))


def _num_rows(file: Path) -> int:
    with readable(file):
        return int(pq.read_metadata(file).num_rows)


def _num_places(file: Path, name: str) -> int:
    """Number of values of a list column, with one for each list that is empty or null."""
    return sum(column.num_values for column in _column_chunks(file, name))


def _column_chunks(file: Path, name: str) -> Iterator[pq.ColumnChunkMetaData]:
    with readable(file):
        metadata = pq.read_metadata(file)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = (group.column(place) for place in range(group.num_columns))
        yield from (chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == name)


def _integers(batch_R: pa.Array, file: Path, name: str) -> NDArray[np.int64]:
    _refuse_nulls(batch_R, file, name)
    if not pa.types.is_integer(batch_R.type):
        raise UserError(f"{file}: column {name} is {batch_R.type}, not int64; {REMEDY}")
    values_R: NDArray[np.int64] = batch_R.cast(pa.int64()).to_numpy()
    return values_R


def _refuse_nulls(batch_R: pa.Array, file: Path, name: str) -> None:
    if batch_R.null_count:
        raise UserError(f"{file}: column {name} has nulls; {REMEDY}")


class _Texts:
    """Texts appended batch by batch. A bytearray grows without a second copy, since the system moves its pages."""

    def __init__(self) -> None:
        self.num_texts = 0
        self._content = bytearray()
        self._ends = bytearray()

    def append(self, texts_R: pa.Array, file: Path) -> None:
        offsets = np.frombuffer(texts_R.buffers()[1], np.int32)[texts_R.offset : texts_R.offset + len(texts_R) + 1]
        if len(self._content) + int(offsets[-1] - offsets[0]) > _LONGEST_TEXT:
            raise UserError(f"{file}: the texts of column item_id are longer than 2 GiB in all; give shorter ids")
        self._ends += (offsets[1:] - offsets[0] + np.int32(len(self._content))).tobytes()
        if (data := texts_R.buffers()[2]) is not None:
            self._content += memoryview(data)[offsets[0] : offsets[-1]]
        self.num_texts += len(texts_R)

    def array(self) -> pa.Array:
        offsets = np.zeros(self.num_texts + 1, np.int32)
        offsets[1:] = np.frombuffer(self._ends, np.int32)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(self._content)]
        return pa.Array.from_buffers(pa.string(), self.num_texts, buffers)


def _refuse_duplicates(ids_V: pa.Array, file: Path) -> None:
    # Sorted hashes take 8 bytes an item, a hash table of the ids several times as much.
    keys_V = np.empty(len(ids_V), np.uint64)
    for first in range(0, len(ids_V), _BATCH_ROWS):
        ids_R = ids_V.slice(first, _BATCH_ROWS)
        is_text = pa.types.is_string(ids_R.type)
        keys_R = text_hashes(ids_R.cast(pa.large_string())) if is_text else ids_R.to_numpy().view(np.uint64)
        keys_V[first : first + len(ids_R)] = keys_R
    keys_V.sort()
    if not (keys_V[1:] == keys_V[:-1]).any() or pc.count_distinct(ids_V).as_py() == len(ids_V):
        return
    counts = ids_V.value_counts()
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    raise UserError(
        f"{file}: column item_id has {len(repeated)} duplicate ids, such as {repeated[0].as_py()!r}; {REMEDY}"
    )
