"""Vectors of all items from one lookup of each row of the item tables.

A full softmax needs the vectors of the whole catalog in every step. Looked up item by item, the row of a word is read
once for each item that has it, and its gradient is collected from as many places. Here each row is looked up once, and
the vectors are sums of rows by constant bags; the gradients of the rows are sums of those of the vectors by the
transposed bags.

With two features, the looked-up values hold the rows of both tables side by side, zeros after the end of the shorter:

    row 0   item 0    word 0       slots 0  1
    row 1   item 1    word 1       slots 2  3
    row 2   item 2    (zeros)      slots 4  5

so row r of table f is slot r * F + f, and item 1 with the words 0 and 1 is the bag of slots 2, 1 and 3 with the weights
1, 1/2 and 1/2.

Shapes: V items, N nodes, F features, S rows of the largest table, E elements of all bags, D = d1 columns.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedTensor

from llmgr_rec.data.collate import ITEM_ID
from llmgr_rec.data.jagged import Jagged, lengths_to_offsets

# Slots, weights and offsets of bags.
Bags = tuple[Tensor, Tensor, Tensor]


class WholeCatalog(nn.Module):
    """Item vectors as in `ItemTables`, of all items, from `Collator.with_table_rows`.

    Args:
        num_items: Number of items.
        side_features: Ids of each side feature that the item tables have, one row per item.
    """

    def __init__(self, num_items: int, side_features: Mapping[str, Jagged]) -> None:
        super().__init__()
        self.num_items = num_items
        self.names = [ITEM_ID, *side_features]
        items, slots, weights = [torch.arange(num_items)], [torch.arange(num_items)], [torch.ones(num_items)]
        for feature in side_features.values():
            items.append(feature.row_of_value)
            slots.append(feature.values.to(torch.int64))
            weights.append(feature.lengths.to(torch.float32)[feature.row_of_value].reciprocal())
        num_rows = max(int(values.max()) + 1 for values in slots if values.numel())
        width = len(self.names)
        item_E, weight_E = torch.cat(items), torch.cat(weights)
        slot_E = torch.cat([values * width + place for place, values in enumerate(slots)])
        bags = (_bags(item_E, slot_E, weight_E, num_items), _bags(slot_E, item_E, weight_E, num_rows * width))
        for name, tensors in zip(("of_items", "of_slots"), bags, strict=True):
            for part, tensor in zip(("index", "weight", "offset"), tensors, strict=True):
                self.register_buffer(f"{part}_{name}", tensor, persistent=False)

    def forward(self, rows: KeyedTensor, node_items_N: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of all items, [V, D], and of the nodes, [N, D].

        Args:
            rows: Each row of each table once.
            node_items_N: Item of each node.
        """
        # A sharded collection may order the features in another way.
        in_order = list(rows.keys()) == self.names
        values = rows.values() if in_order else torch.cat([rows[name] for name in self.names], dim=1)
        if len(self.names) == 1:
            bags = None
        else:
            bags = tuple(getattr(self, f"{part}_{name}") for name in _SIDES for part in _PARTS)
        return _VectorsOfBags.apply(values, node_items_N, bags, len(self.names))


_SIDES, _PARTS = ("of_items", "of_slots"), ("index", "weight", "offset")


def _bags(bag_E: Tensor, member_E: Tensor, weight_E: Tensor, num_bags: int) -> Bags:
    order_E = torch.argsort(bag_E, stable=True)
    return member_E[order_E], weight_E[order_E], lengths_to_offsets(torch.bincount(bag_E, minlength=num_bags))


def _sums(values: Tensor, index: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """Weighted sums of rows of the values by bag."""
    return functional.embedding_bag(
        index, values, offset, mode="sum", per_sample_weights=weight.to(values.dtype), include_last_offset=True
    )


class _VectorsOfBags(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, node_items_N: Tensor, bags: tuple[Tensor, ...] | None, width: int
    ) -> tuple[Tensor, Tensor]:
        ctx.bags, ctx.shape = bags, values.shape
        ctx.save_for_backward(node_items_N)
        slots = values.reshape(values.shape[0] * width, -1)
        items_VD = slots.clone() if bags is None else _sums(slots, *bags[:3])
        return items_VD, items_VD.index_select(0, node_items_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_VD: Tensor, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        (node_items_N,) = ctx.saved_tensors
        grad_VD = grad_VD.index_add(0, node_items_N, grad_ND)
        return (grad_VD if ctx.bags is None else _sums(grad_VD, *ctx.bags[3:])).view(ctx.shape), None, None, None
