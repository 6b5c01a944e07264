"""Table I/O: access to this rank's shards of the embedding tables of a module, sharded or not.

Initialization, export and loading of tables use `local_shards`.

Shapes: R rows and C columns of a shard or of a block to read, V rows of a table.
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
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

_COLLECTIONS = (
    EmbeddingBagCollection,
    EmbeddingCollection,
    FusedEmbeddingBagCollection,
    ShardedEmbeddingBagCollection,
    ShardedEmbeddingCollection,
)
_WRAPPERS = ("_dmp_wrapped_module", "module", "_fsdp_wrapped_module")

# Initial values are drawn in blocks of this shape, each by a separate generator, so that a rank draws only the blocks
# of its shards. Widths of column shards are multiples of 4 (fbgemm), so no block belongs to two of them.
_BLOCK_ROWS = 8192
_BLOCK_COLUMNS = 4

# Rows that are copied at a time when a table is filled, which bounds the temporary memory.
_FILL_ROWS = 65536


@dataclass(frozen=True)
class Shard:
    """A block of an embedding table on this rank.

    Args:
        parameter: Qualified name of the table's parameter, without wrapper modules (DMP, DDP).
        table: Name of the table in its collection.
        tensor: The values, [R, C]; shares memory with the model.
        row_offset: First row of the block in the table.
        col_offset: First column of the block in the table.
        num_rows: Number of rows of the table.
        dim: Number of columns of the table.
    """

    parameter: str
    table: str
    tensor: Tensor
    row_offset: int
    col_offset: int
    num_rows: int
    dim: int


def local_shards(module: nn.Module) -> Iterator[Shard]:
    """Iterates over this rank's shards of all embedding tables.

    Args:
        module: Any module; its embedding collections may be sharded by TorchRec or not.

    Yields:
        Shards in the order of the module's collections. An unsharded table is a single shard.
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
            for tensor, (row, col) in _local_tensors(value):
                yield Shard(parameter, ".".join(parts[1:-1]), tensor, row, col, num_rows, dim)


def unwrapped_name(name: str) -> str:
    """Removes the names of wrapper modules (DMP, DDP, FSDP) from a qualified name."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def init_tables(module: nn.Module, seed: int, std: float) -> None:
    """Fills tables with normal random numbers that depend only on seed, table name, row and column.

    The values therefore do not depend on the sharding and the number of ranks.

    Args:
        module: Any module with embedding collections.
        seed: Seed of the run.
        std: Standard deviation.
    """
    for shard in local_shards(module):
        _fill(shard, partial(_random_values, seed, std, shard.table))


def fill_table(module: nn.Module, parameter: str, read: Callable[[range, range], Tensor]) -> None:
    """Fills this rank's shards of a table.

    Args:
        module: Any module with embedding collections.
        parameter: Qualified name of the table's parameter.
        read: Returns the values of a block of the table, [R, C], given its rows and columns.

    Raises:
        KeyError: The module has no such table, on any rank.
    """
    if parameter not in (known := list(table_parameters(module))):
        raise KeyError(f"no embedding table {parameter}; tables are {', '.join(known)}")
    for shard in local_shards(module):
        if shard.parameter == parameter:
            _fill(shard, read)


def local_rows(shard: Shard, start: int, stop: int) -> range:
    """Intersection of the rows start .. stop - 1 of a table with the rows of a shard."""
    first = max(start, shard.row_offset)
    return range(first, max(first, min(stop, shard.row_offset + shard.tensor.shape[0])))


def write_rows(shard: Shard, start: int, values_RC: Tensor) -> None:
    """Writes rows of a table to a shard; rows and columns outside of the shard are ignored.

    Args:
        shard: From `local_shards`.
        start: Row of the table at which the values start.
        values_RC: Consecutive rows, with all columns of the table.
    """
    rows = local_rows(shard, start, start + values_RC.shape[0])
    local_RC = values_RC[rows.start - start : rows.stop - start, shard.col_offset :][:, : shard.tensor.shape[1]]
    shard.tensor[rows.start - shard.row_offset : rows.stop - shard.row_offset].copy_(local_RC)


def zero_rows(module: nn.Module, table: str, rows_V: Tensor) -> None:
    """Sets rows of a table to zero in this rank's shards.

    Args:
        module: Any module with embedding collections.
        table: Name of the table in its collection.
        rows_V: Mask of the rows, bool.
    """
    for shard in local_shards(module):
        if shard.table == table:
            local_R = rows_V[shard.row_offset : shard.row_offset + shard.tensor.shape[0]]
            shard.tensor[local_R.to(shard.tensor.device)] = 0


def table_parameters(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Shape (rows, columns) of each table by parameter name, equal on all ranks."""
    return {name: _shape(value) for name, value in _tables(module)}


def has_half_precision(module: nn.Module) -> bool:
    """Whether the tables of a module are float16, equal on all ranks."""
    return any(
        (value.metadata().tensor_properties.dtype if isinstance(value, ShardedTensor) else value.dtype) == torch.float16
        for _, value in _tables(module)
    )


def _tables(module: nn.Module) -> Iterator[tuple[str, Tensor | ShardedTensor]]:
    """Each table by parameter name."""
    for path, collection in module.named_modules():
        if isinstance(collection, _COLLECTIONS):
            prefix = unwrapped_name(path)
            for key, value in collection.state_dict().items():
                if key.endswith(".weight") and key.split(".")[0] in ("embedding_bags", "embeddings"):
                    yield f"{prefix}.{key}" if prefix else key, value


def _shape(value: Tensor | ShardedTensor) -> tuple[int, int]:
    # Not ShardedTensor.shape, which gives a deprecation warning.
    rows, dim = value.metadata().size if isinstance(value, ShardedTensor) else value.shape
    return rows, dim


def _local_tensors(value: Tensor | ShardedTensor) -> Iterator[tuple[Tensor, tuple[int, int]]]:
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


def _random_values(seed: int, std: float, table: str, rows: range, cols: range) -> Tensor:
    values_RC = torch.empty(len(rows), len(cols))
    for block_row in range(rows.start // _BLOCK_ROWS, -(-rows.stop // _BLOCK_ROWS)):
        for block_col in range(cols.start // _BLOCK_COLUMNS, -(-cols.stop // _BLOCK_COLUMNS)):
            # Blocks are always drawn in full, so that the rows of a table do not depend on their number.
            generator = torch.Generator().manual_seed(_block_seed(seed, table, block_row, block_col))
            block = torch.randn(_BLOCK_ROWS, _BLOCK_COLUMNS, generator=generator)
            row0, col0 = block_row * _BLOCK_ROWS, block_col * _BLOCK_COLUMNS
            row_lo, row_hi = max(rows.start, row0), min(rows.stop, row0 + _BLOCK_ROWS)
            col_lo, col_hi = max(cols.start, col0), min(cols.stop, col0 + _BLOCK_COLUMNS)
            values_RC[row_lo - rows.start : row_hi - rows.start, col_lo - cols.start : col_hi - cols.start] = block[
                row_lo - row0 : row_hi - row0, col_lo - col0 : col_hi - col0
            ]
    return values_RC.mul_(std)


def _block_seed(seed: int, table: str, block_row: int, block_col: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{table}/{block_row}/{block_col}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
