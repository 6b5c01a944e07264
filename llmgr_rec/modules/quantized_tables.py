"""Embedding tables in fewer bits for ranking, by TorchRec's quantized EmbeddingBagCollection.

A row of float16 has two bytes for each column. A row of int8 or int4 has a code for each column, and a scale and a bias
of its own in float16, so a value is code * scale + bias. Lookups return float32. The rows of a table are encoded block
by block, so the table is never in memory as float32.

Shapes: R rows and C columns of a table, X bytes of a row.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from llmgr_rec.config import TableDType

if TYPE_CHECKING:
    from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantizedCollection

_BITS: dict[TableDType, int] = {"float32": 32, "float16": 16, "int8": 8, "int4": 4}
_DATA_TYPES: dict[TableDType, DataType] = {"float16": DataType.FP16, "int8": DataType.INT8, "int4": DataType.INT4}
# Scale and bias, in float16.
_SCALE_BYTES = 4
_LARGEST = torch.finfo(torch.float16).max
# fbgemm's alignment of rows on a GPU, in bytes; a CPU needs none.
_GPU_ALIGNMENT = 16
# Rows that are encoded at a time.
_BLOCK_ROWS = 65536


def has_codes(dtype: TableDType) -> bool:
    """Whether values are integer codes, with a scale and a bias for each row."""
    return dtype in ("int8", "int4")


def row_bytes(num_columns: int, dtype: TableDType) -> int:
    """Bytes of a row of a table.

    Args:
        num_columns: Columns of the table, a multiple of 4.
        dtype: Number format of the table.
    """
    return num_columns * _BITS[dtype] // 8 + (_SCALE_BYTES if has_codes(dtype) else 0)


def encode_rows(values_RC: Tensor, dtype: TableDType) -> Tensor:
    """Rows in the form in which files and collections have them.

    Args:
        values_RC: Rows, float32.
        dtype: Number format of the result.

    Returns:
        float32 or float16 [R, C]; of integers uint8 [R, X], the codes followed by scale and bias.

    Raises:
        OverflowError: A value is beyond the range of float16.
    """
    if dtype == "float32":
        return values_RC
    # NaN is not below any number.
    if values_RC.numel() and not bool(values_RC.abs().amax() <= _LARGEST):
        raise OverflowError(f"values beyond {_LARGEST:,.0f}, the largest number of float16")
    if dtype == "float16":
        return values_RC.half()
    codes_RX: Tensor = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(
        values_RC.contiguous(), _BITS[dtype]
    )
    return codes_RX


def decode_rows(rows: Tensor, dtype: TableDType) -> Tensor:
    """The values of rows from `encode_rows`, float32 [R, C].

    Args:
        rows: Encoded rows.
        dtype: Their number format.
    """
    if not has_codes(dtype):
        return rows.float()
    values_RC: Tensor = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloatOrHalf(
        rows.contiguous(), _BITS[dtype], output_dtype=0
    )
    return values_RC


def quantize_tables(
    model: nn.Module,
    dtype: TableDType,
    device: torch.device,
    read: Callable[[str, int, range], Tensor],
) -> None:
    """Replaces the tables of a model by tables of fewer bits, which can be looked up only.

    Args:
        model: A model whose tables are not sharded; on the meta device they take no memory. Modified in place.
        dtype: Number format, not float32.
        device: Device of the tables.
        read: Returns encoded rows, given the name of a table, its number of columns, and the rows.
    """
    collections = [(path, part) for path, part in model.named_modules() if isinstance(part, EmbeddingBagCollection)]
    for path, collection in collections:
        quantized = _empty_collection(collection.embedding_bag_configs(), dtype, device)
        for name, codes_RX, scales_RX in _tables(quantized):
            columns = next(table.embedding_dim for table in quantized.embedding_bag_configs() if table.name == name)
            for start in range(0, codes_RX.shape[0], _BLOCK_ROWS):
                rows = range(start, min(start + _BLOCK_ROWS, codes_RX.shape[0]))
                _write(codes_RX[rows.start : rows.stop], scales_RX, rows, read(name, columns, rows))
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, quantized)


def _empty_collection(
    tables: list[EmbeddingBagConfig], dtype: TableDType, device: torch.device
) -> "QuantizedCollection":
    # Imported here, because it takes long and float32 tables do not need it.
    from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantizedCollection

    return QuantizedCollection(
        tables=[
            EmbeddingBagConfig(
                name=table.name,
                feature_names=table.feature_names,
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                pooling=table.pooling,
                data_type=_DATA_TYPES[dtype],
            )
            for table in tables
        ],
        is_weighted=False,
        device=device,
        row_alignment=1 if device.type == "cpu" else _GPU_ALIGNMENT,
        # Makes the lookup modules, which have the memory of the tables, submodules.
        register_tbes=True,
    )


def _tables(collection: "QuantizedCollection") -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Name of each table with the bytes of its values and of its scales, which share memory with the collection."""
    for lookup in cast("list[Any]", collection.tbes):
        for spec, (codes_RX, scales_RX) in zip(lookup.embedding_specs, lookup.split_embedding_weights(), strict=True):
            yield spec[0], codes_RX, scales_RX


def _write(codes_RX: Tensor, scales_RX: Tensor | None, rows: range, encoded: Tensor) -> None:
    encoded_RX = encoded.contiguous().view(torch.uint8)
    if scales_RX is None:
        codes_RX[:, : encoded_RX.shape[1]].copy_(encoded_RX)
        return
    codes_RX.copy_(encoded_RX[:, :-_SCALE_BYTES])
    scales_RX[rows.start : rows.stop].copy_(encoded_RX[:, -_SCALE_BYTES:])
