"""What this rank holds of every embedding table, whether the module is sharded or not.

One mechanism serves initialization, filling, export and loading: all go through `local_shards`.
Shapes: R rows of a piece, C columns of a piece, V rows of a table.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

_COLLECTIONS = (
    EmbeddingBagCollection,
    EmbeddingCollection,
    ShardedEmbeddingBagCollection,
    ShardedEmbeddingCollection,
)
_WRAPPERS = ("_dmp_wrapped_module", "module", "_fsdp_wrapped_module")

# Initial values come in blocks of this many rows and columns, each from its own generator, so a shard costs only its
# own blocks. Tables are cut at multiples of 4 columns (fbgemm), so no cut runs through a block's columns.
_BLOCK_ROWS = 8192
_BLOCK_COLUMNS = 4

# Rows moved at a time when a table is filled, which bounds the memory beside the table itself.
_FILL_ROWS = 65536


@dataclass(frozen=True)
class Shard:
    """A rectangle of a table that this rank holds.

    Args:
        parameter: Qualified name of the table's parameter, wrappers (DMP, DDP) left out.
        table: Name of the table in its collection.
        tensor: The values, [R, C]; writing into it changes the model.
        row_offset: Row of the table where the rectangle starts.
        col_offset: Column of the table where the rectangle starts.
        num_rows: Rows of the whole table.
        dim: Columns of the whole table.
    """

    parameter: str
    table: str
    tensor: Tensor
    row_offset: int
    col_offset: int
    num_rows: int
    dim: int


def local_shards(module: nn.Module) -> Iterator[Shard]:
    """Lists what this rank holds of every embedding table.

    Args:
        module: Any module; its embedding collections may be sharded by TorchRec or not.

    Yields:
        Shards in the module's own order. A table of which this rank holds nothing yields none.
    """
    for path, collection in module.named_modules():
        if not isinstance(collection, _COLLECTIONS):
            continue
        prefix = unwrapped_name(path)
        for key, value in collection.state_dict().items():
            parts = key.split(".")
            if parts[-1] != "weight" or parts[0] not in ("embedding_bags", "embeddings"):
                continue
            parameter = f"{prefix}.{key}" if prefix else key
            num_rows, dim = _shape(value)
            for tensor, (row, col) in _pieces(value):
                yield Shard(parameter, ".".join(parts[1:-1]), tensor, row, col, num_rows, dim)


def unwrapped_name(name: str) -> str:
    """A qualified name without the parts that DistributedModelParallel and DistributedDataParallel put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def init_tables(module: nn.Module, seed: int, std: float) -> None:
    """Fills tables with normal random numbers that depend on seed, table name, row and column only.

    So every sharding and every number of ranks makes the same table, and no shard is a copy of another.

    Args:
        module: Any module with embedding collections.
        seed: Seed of the run.
        std: Standard deviation.
    """
    for shard in local_shards(module):
        _fill(shard, partial(_random_piece, seed, std, shard.table))


def fill_table(module: nn.Module, parameter: str, read: Callable[[range, range], Tensor]) -> None:
    """Fills what this rank holds of one table.

    Args:
        module: Any module with embedding collections.
        parameter: Qualified name of the table's parameter.
        read: Gives the values of a rectangle of the table from its rows and columns, as [R, C].

    Raises:
        KeyError: Nowhere in the module is such a table; a rank that merely holds no part of it does nothing.
    """
    if parameter not in (known := list(table_parameters(module))):
        raise KeyError(f"no embedding table {parameter}; tables are {', '.join(known)}")
    for shard in local_shards(module):
        if shard.parameter == parameter:
            _fill(shard, read)


def held_rows(shard: Shard, start: int, stop: int) -> range:
    """Those of the rows start .. stop - 1 of a table that a shard has a part of."""
    first = max(start, shard.row_offset)
    return range(first, max(first, min(stop, shard.row_offset + shard.tensor.shape[0])))


def write_rows(shard: Shard, start: int, values_RC: Tensor) -> None:
    """Writes what a shard holds of consecutive rows of its table.

    Args:
        shard: From `local_shards`.
        start: Row of the table where the values start.
        values_RC: The rows, with all columns of the table.
    """
    rows = held_rows(shard, start, start + values_RC.shape[0])
    own_RC = values_RC[rows.start - start : rows.stop - start, shard.col_offset :][:, : shard.tensor.shape[1]]
    shard.tensor[rows.start - shard.row_offset : rows.stop - shard.row_offset].copy_(own_RC)


def zero_rows(module: nn.Module, table: str, rows_V: Tensor) -> None:
    """Sets rows of a table to zero, in what this rank holds of it.

    Args:
        module: Any module with embedding collections.
        table: Name of the table in its collection.
        rows_V: Which rows, bool, one a row of the table.
    """
    for shard in local_shards(module):
        if shard.table == table:
            own_R = rows_V[shard.row_offset : shard.row_offset + shard.tensor.shape[0]]
            shard.tensor[own_R.to(shard.tensor.device)] = 0


def table_parameters(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Every table's parameter name and its shape (rows, columns), the same on all ranks."""
    tables = {}
    for path, collection in module.named_modules():
        if isinstance(collection, _COLLECTIONS):
            prefix = unwrapped_name(path)
            for key, value in collection.state_dict().items():
                if key.endswith(".weight") and key.split(".")[0] in ("embedding_bags", "embeddings"):
                    tables[f"{prefix}.{key}" if prefix else key] = _shape(value)
    return tables


def _shape(value: Tensor | ShardedTensor) -> tuple[int, int]:
    # ShardedTensor.shape warns of its deprecation, its metadata does not.
    rows, dim = value.metadata().size if isinstance(value, ShardedTensor) else value.shape
    return rows, dim


def _pieces(value: Tensor | ShardedTensor) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    if not isinstance(value, ShardedTensor):
        yield value.detach(), (0, 0)
        return
    for shard in value.local_shards():
        row, col = shard.metadata.shard_offsets
        yield shard.tensor.detach(), (row, col)


def _fill(shard: Shard, read: Callable[[range, range], Tensor]) -> None:
    num_rows, num_cols = shard.tensor.shape
    cols = range(shard.col_offset, shard.col_offset + num_cols)
    for start in range(0, num_rows, _FILL_ROWS):
        stop = min(start + _FILL_ROWS, num_rows)
        values_RC = read(range(shard.row_offset + start, shard.row_offset + stop), cols)
        shard.tensor[start:stop].copy_(values_RC)


def _random_piece(seed: int, std: float, table: str, rows: range, cols: range) -> Tensor:
    piece_RC = torch.empty(len(rows), len(cols))
    for block_row in range(rows.start // _BLOCK_ROWS, -(-rows.stop // _BLOCK_ROWS)):
        for block_col in range(cols.start // _BLOCK_COLUMNS, -(-cols.stop // _BLOCK_COLUMNS)):
            # A whole block is drawn always: a table that grows keeps the values of its old rows.
            generator = torch.Generator().manual_seed(_block_seed(seed, table, block_row, block_col))
            block = torch.randn(_BLOCK_ROWS, _BLOCK_COLUMNS, generator=generator)
            row0, col0 = block_row * _BLOCK_ROWS, block_col * _BLOCK_COLUMNS
            row_lo, row_hi = max(rows.start, row0), min(rows.stop, row0 + _BLOCK_ROWS)
            col_lo, col_hi = max(cols.start, col0), min(cols.stop, col0 + _BLOCK_COLUMNS)
            piece_RC[row_lo - rows.start : row_hi - rows.start, col_lo - cols.start : col_hi - cols.start] = block[
                row_lo - row0 : row_hi - row0, col_lo - col0 : col_hi - col0
            ]
    return piece_RC.mul_(std)


def _block_seed(seed: int, table: str, block_row: int, block_col: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{table}/{block_row}/{block_col}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
