"""Attention over prompts packed into one row, with one copy of their common prefix.

Queries see the prefix's keys through one product for the whole batch, and their own prompt's through a batched one;
one softmax runs over both. Nothing is copied for each prompt, and padding exists here alone, not in the linear layers.

Shapes: P tokens of the prefix, X tokens after it, Y querying tokens, B prompts, Q and K tokens of the longest prompt
among queries and keys, G key and value heads, R query heads of each, E columns of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llmgr_rec.modules.packing import PackedPrompts, PromptGrid, visible_places


@dataclass
class View:
    """What querying tokens see, worked out once for all layers.

    Args:
        queries: The querying tokens.
        keys: All tokens after the prefix.
        visible_BQK: What each query's place sees of its own prompt.
        prefix: Tokens of the prefix P; all queries see all of them.
    """

    queries: PromptGrid
    keys: PromptGrid
    visible_BQK: Tensor
    prefix: int

    @classmethod
    def of(cls, packed: PackedPrompts, tokens_Y: Tensor, keys: PromptGrid) -> "View":
        """The view of some tokens after the prefix."""
        queries = PromptGrid.of(packed, tokens_Y)
        return cls(queries, keys, visible_places(packed, queries, keys), packed.prefix_P.numel())


def attend(query_YhE: Tensor, key_ZGE: Tensor, value_ZGE: Tensor, view: View, scale: float) -> Tensor:
    """Attention of tokens after the prefix.

    Args:
        query_YhE: Queries of the view's tokens, [Y, G * R, E].
        key_ZGE: Keys of the whole row, the prefix first, [P + X, G, E].
        value_ZGE: Values of the whole row, likewise.
        view: Who sees what.
        scale: Factor of the scores.

    Returns:
        Results, [Y, G * R, E].
    """
    num_groups, width = key_ZGE.shape[1:]
    batch, queries, keys = view.visible_BQK.shape
    heads = query_YhE.shape[1] // num_groups
    own_query = view.queries.set_out((query_YhE * scale).flatten(1))
    # [G, B, R, Q, E]: rows of one product with the prefix, and of one product a prompt.
    query = own_query.view(batch, queries, num_groups, heads, width).permute(2, 0, 3, 1, 4).contiguous()
    own_key, own_value = (_own(tensor, view, batch, keys) for tensor in (key_ZGE, value_ZGE))
    prefix_key, prefix_value = (tensor[: view.prefix].transpose(0, 1) for tensor in (key_ZGE, value_ZGE))
    prefix_scores = query.view(num_groups, -1, width) @ prefix_key.transpose(1, 2)
    own_scores = query.view(num_groups, batch, heads * queries, width) @ own_key.transpose(2, 3)
    unseen = ~view.visible_BQK.unsqueeze(1).unsqueeze(0)
    own_scores = own_scores.view(num_groups, batch, heads, queries, keys).masked_fill(unseen, float("-inf"))
    scores = torch.cat([prefix_scores.view(*own_scores.shape[:4], view.prefix), own_scores], dim=4)
    prefix_weights, own_weights = scores.softmax(dim=4).split([view.prefix, keys], dim=4)
    result = prefix_weights.flatten(1, 3) @ prefix_value
    own_result = own_weights.flatten(2, 3) @ own_value
    result = result.view(num_groups, batch, heads, queries, width) + own_result.view(
        num_groups, batch, heads, queries, width
    )
    result = result.permute(1, 3, 0, 2, 4).reshape(batch, queries, -1)
    return view.queries.gather(result).view(query_YhE.shape)


def _own(tensor_ZGE: Tensor, view: View, batch: int, keys: int) -> Tensor:
    """Keys or values of each prompt's own tokens, [G, B, K, E]."""
    num_groups, width = tensor_ZGE.shape[1:]
    own = view.keys.set_out(tensor_ZGE[view.prefix :].flatten(1))
    return own.view(batch, keys, num_groups, width).permute(2, 0, 1, 3)


def attend_within_prefix(query_PhE: Tensor, key_ZGE: Tensor, value_ZGE: Tensor, scale: float) -> Tensor:
    """Causal attention of the prefix to itself, [P, G * R, E]."""
    prefix = query_PhE.shape[0]
    query, key, value = (tensor[:prefix].transpose(0, 1).unsqueeze(0) for tensor in (query_PhE, key_ZGE, value_ZGE))
    result = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return result[0].transpose(0, 1)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, view: View, scale: float) -> Tensor:
    """Attention of a packed row in transformers' form.

    Args:
        query: Of the whole row or, in a layer that is computed only where it is read, of the view's tokens alone,
            [1, G * R, P + X or Y, E].
        key: Of the whole row, [1, G, P + X, E].
        value: Likewise.
        view: Who sees what.
        scale: Factor of the scores.

    Returns:
        Results, [1, P + X or Y, G * R, E].
    """
    query_, key_, value_ = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    with_prefix = query_.shape[0] - view.queries.tokens_Y.numel()
    result = attend(query_[with_prefix:], key_, value_, view, scale)
    if with_prefix:
        result = torch.cat([attend_within_prefix(query_[:with_prefix], key_, value_, scale), result])
    return result.unsqueeze(0)
