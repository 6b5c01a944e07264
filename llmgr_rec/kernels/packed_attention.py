"""Attention over prompts packed into one row, with one copy of their common prefix.

Queries see the prefix's keys through one product for many prompts, and their own prompt's through a batched one; one
softmax runs over both. Nothing is copied for each prompt. Padding exists here alone, not in the linear layers, and
little of it: prompts of like length are set out together.

Shapes: P tokens of the prefix, X tokens after it, Y querying tokens, B prompts of like length, Q and K tokens of the
longest of them among queries and keys, G key and value heads, R query heads of each, E columns of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llmgr_rec.kernels.prompt_packing import PackedPrompts, PromptGrid, rows_by_prompt


@dataclass
class Band:
    """Prompts of like length.

    Args:
        queries: Their querying tokens.
        keys: All their tokens.
        unseen_BQK: What each query's place does not see of its prompt.
    """

    queries: PromptGrid
    keys: PromptGrid
    unseen_BQK: Tensor


@dataclass
class View:
    """What querying tokens see, worked out once for all layers.

    Args:
        tokens_Y: The querying tokens, counted from the end of the prefix.
        prefix: Tokens of the prefix P; all queries see all of them.
        bands: The prompts.
        place_Y: Place of each querying token among the places of all bands.
    """

    tokens_Y: Tensor
    prefix: int
    bands: list[Band]
    place_Y: Tensor

    @classmethod
    def of(cls, packed: PackedPrompts, tokens_Y: Tensor) -> "View":
        """The view of some tokens, at least one of each prompt."""
        tokens_X = torch.arange(packed.num_tokens, device=tokens_Y.device)
        all_keys, all_queries = rows_by_prompt(packed, tokens_X), rows_by_prompt(packed, tokens_Y)
        # A band's longest prompt is less than twice its shortest.
        band_B = torch.log2(all_keys.lengths.float()).floor()
        bands = []
        for number in torch.unique(band_B):
            prompts = torch.nonzero(band_B == number).squeeze(1)
            queries, keys = PromptGrid.of(all_queries.select(prompts)), PromptGrid.of(all_keys.select(prompts))
            seen_BQK = packed.sees(tokens_Y[queries.row_BW].unsqueeze(2), keys.row_BW.unsqueeze(1))
            # Padding sees its whole prompt: nobody reads its result, but a softmax over nothing would be no number.
            seen_BQK |= ~queries.filled_BW.unsqueeze(2)
            bands.append(Band(queries, keys, ~(seen_BQK & keys.filled_BW.unsqueeze(1))))
        filled = torch.cat([band.queries.filled_BW.flatten() for band in bands])
        rows = torch.cat([band.queries.row_BW.flatten() for band in bands])
        place_Y = torch.empty_like(tokens_Y)
        place_Y[rows[filled]] = torch.nonzero(filled).squeeze(1)
        return cls(tokens_Y, packed.prefix_P.numel(), bands, place_Y)


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
    prefix_key, prefix_value = (tensor[: view.prefix].transpose(0, 1) for tensor in (key_ZGE, value_ZGE))
    own_key, own_value = (tensor[view.prefix :].flatten(1) for tensor in (key_ZGE, value_ZGE))
    own_query = (query_YhE * scale).flatten(1)
    results = [_attend(band, own_query, own_key, own_value, prefix_key, prefix_value) for band in view.bands]
    return torch.cat(results).index_select(0, view.place_Y).view(query_YhE.shape)


def _attend(band: Band, query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
    """Results at the places of one band, [B * Q, G * R * E]."""
    num_groups, prefix, width = prefix_key.shape
    batch, queries, keys = band.unseen_BQK.shape
    heads = query.shape[1] // (num_groups * width)
    # [G, B, R * Q, E]: rows of one product with the prefix, and of one product a prompt.
    query = band.queries.set_out(query).view(batch, queries, num_groups, heads, width).permute(2, 0, 3, 1, 4)
    query = query.reshape(num_groups, batch, heads * queries, width)
    key, value = (
        band.keys.set_out(own).view(batch, keys, num_groups, width).permute(2, 0, 1, 3) for own in (key, value)
    )
    prefix_scores = (query.flatten(1, 2) @ prefix_key.transpose(1, 2)).view(num_groups, batch, heads, queries, prefix)
    own_scores = (query @ key.transpose(2, 3)).view(num_groups, batch, heads, queries, keys)
    own_scores = own_scores.masked_fill(band.unseen_BQK.unsqueeze(1), float("-inf"))
    weights = torch.cat([prefix_scores, own_scores], dim=4).softmax(dim=4).flatten(2, 3)
    result = (weights[..., :prefix].flatten(1, 2) @ prefix_value).view_as(query) + weights[..., prefix:] @ value
    return result.view(num_groups, batch, heads, queries, width).permute(1, 3, 0, 2, 4).reshape(batch * queries, -1)


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
    with_prefix = query_.shape[0] - view.tokens_Y.numel()
    result = attend(query_[with_prefix:], key_, value_, view, scale)
    if with_prefix:
        result = torch.cat([attend_within_prefix(query_[:with_prefix], key_, value_, scale), result])
    return result.unsqueeze(0)
