"""Most similar items, computed by all ranks: each has the features of a range of items.

The features pass from rank to rank. Each rank compares its own items (rows) with those that pass by (columns) and keeps
the most similar. Then the similarities go to the ranks of their columns, since a rank ranks its own items only.

Shapes: V items, R items of this rank, S items of another rank, U items of a block, F features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from scipy import sparse

from llmgr_rec.baselines.item_similarity import similar_blocks, unit_rows
from llmgr_rec.baselines.sparse_scores import nearest
from llmgr_rec.distributed.collectives import gather_from_ranks
from llmgr_rec.distributed.item_vectors import items_of_rank
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.sparse_exchange import pass_on
from llmgr_rec.kernels.sparse_product import SparseProduct

# Rows whose most similar items are replaced together when those of another rank are added.
_BLOCK_ROWS = 1 << 16


def similarity_of_ranks(
    features_RF: sparse.csr_array, num_items: int, k_neighbors: int, world: World, group: dist.ProcessGroup | None
) -> sparse.csr_array:
    """Cosines of items by their features, as `cosine_similarity` in one process, to the bit.

    A rank needs memory for the features of its items and of those of two other ranks, and for two times `k_neighbors`
    similarities of each of its items.

    Args:
        features_RF: Non-negative features of this rank's items (`items_of_rank`), float64.
        num_items: Number of items V.
        k_neighbors: Number of most similar items per item, at least 1 (ties: lower index).
        world: Ranks; all call together.
        group: Group of all ranks on the CPU.

    Returns:
        Similarities of all items (rows) to those of this rank (columns), float32 [V, R].
    """
    blocks = _most_similar(unit_rows(features_RF), num_items, k_neighbors, world, group)
    return _by_columns(blocks, num_items, world, group)


def _most_similar(
    units_RF: sparse.csr_array, num_items: int, k_neighbors: int, world: World, group: dist.ProcessGroup | None
) -> list[sparse.csr_array]:
    """The most similar of all items for each item of this rank, float32 [U, V] of blocks of `_BLOCK_ROWS` rows."""
    starts = range(0, max(units_RF.shape[0], 1), _BLOCK_ROWS)
    found: list[sparse.csr_array] = []
    passing_SF = units_RF
    for step in range(world.size):
        owner = (world.rank + step) % world.size
        product = SparseProduct(passing_SF.T.tocsr())
        for number, start in enumerate(starts):
            rows_UF = units_RF[start : start + _BLOCK_ROWS]
            new = list(_compared(product, rows_UF, k_neighbors, start if step == 0 else None, num_items, owner, world))
            merged = sparse.csr_array(sparse.vstack(new, format="csr"))
            if step:
                merged = nearest(sparse.csr_array(found[number] + merged), k_neighbors)
                found[number] = merged
            else:
                found.append(merged)
            if step + 1 == world.size:
                found[number] = merged.astype(np.float32, copy=False)
        del product
        if step + 1 < world.size:
            before, after = (world.rank - 1) % world.size, (world.rank + 1) % world.size
            passing_SF = pass_on(passing_SF, before, after, group)
    return found


def _compared(
    product: SparseProduct,
    rows_UF: sparse.csr_array,
    k_neighbors: int,
    first_item: int | None,
    num_items: int,
    owner: int,
    world: World,
) -> Iterator[sparse.csr_array]:
    """The most similar of the items of a rank, at their places among all items; float32 if there are no others."""
    first_column = num_items * owner // world.size
    dtype = np.float32 if world.size == 1 else np.float64
    for block_US in similar_blocks(product, rows_UF, k_neighbors, first_item):
        columns = (block_US.indices + first_column).astype(np.int32, copy=False)
        arrays = (block_US.data.astype(dtype, copy=False), columns, block_US.indptr)
        yield sparse.csr_array(arrays, shape=(block_US.shape[0], num_items))


def _by_columns(
    blocks: list[sparse.csr_array], num_items: int, world: World, group: dist.ProcessGroup | None
) -> sparse.csr_array:
    """Exchanges rows of all items for columns of this rank's items; empties the list of blocks."""
    held = [items_of_rank(num_items, replace(world, rank=rank)) for rank in range(world.size)]
    counts_W = torch.tensor([_entries(blocks, items) for items in held])
    counts_WW = torch.stack(gather_from_ranks(counts_W, world))
    first_W = np.concatenate([[0], np.cumsum(counts_WW[:, world.rank].numpy())])
    # Filled in place, because pieces and their concatenation would be two copies.
    indices, values = np.empty(first_W[-1], np.int32), np.empty(first_W[-1], np.float32)
    lengths_V = np.empty(num_items, np.int64)
    num_blocks = -(-max(map(len, held)) // _BLOCK_ROWS)
    nothing = sparse.csr_array((0, num_items), dtype=np.float32)
    for step in range(world.size):
        to, source = (world.rank + step) % world.size, (world.rank - step) % world.size
        place, row = int(first_W[source]), held[source].start
        for number in range(num_blocks):
            block_UV = blocks[number] if number < len(blocks) else nothing
            piece = sparse.csr_array(block_UV[:, held[to].start : held[to].stop])
            if step + 1 == world.size and number < len(blocks):
                blocks[number] = nothing
            if step:
                piece = pass_on(piece, to, source, group)
            indices[place : place + piece.nnz], values[place : place + piece.nnz] = piece.indices, piece.data
            lengths_V[row : row + piece.shape[0]] = np.diff(piece.indptr)
            place, row = place + piece.nnz, row + piece.shape[0]
    offsets = np.concatenate([[0], np.cumsum(lengths_V)])
    if len(values) < 1 << 31:
        offsets = offsets.astype(np.int32)
    return sparse.csr_array((values, indices, offsets), shape=(num_items, len(held[world.rank])))


def _entries(blocks: Sequence[sparse.csr_array], items: range) -> int:
    """Number of similarities to a range of items."""
    return sum(int(((block.indices >= items.start) & (block.indices < items.stop)).sum()) for block in blocks)
