"""Attention over packed prompts with one copy of their common prefix.

The keys of a query are the prefix, which all queries of the batch share, and the tokens of its own prompt. With
q, k, v of one head, a query's result is one softmax over both parts:

    [a, b] = softmax([q @ k_prefix.T,  q @ k_own.T + mask])
    result = a @ v_prefix + b @ v_own

The prefix part is one product of all queries with one [P, E] matrix. The own part is a batched product over prompts,
for which queries and keys are padded; prompts of similar length share a bucket, so there is little padding, and nothing
outside of attention is padded. The prefix is never copied for each prompt.

The layout of a bucket puts the query heads that share a key and value head (grouped-query attention), and their
queries, into the rows of one product:

    queries  [G, B, R * Q, E]      prefix keys  [G, P, E]      own keys  [G, B, K, E]
    scores   [G, B, R, Q, P] and [G, B, R, Q, K]

Shapes: P tokens of the prefix, X tokens after it, Z = P + X, Y querying tokens, B prompts of a bucket, Q and K the
most querying tokens and tokens of any of them, G key and value heads, R query heads of each, h = G * R, E columns of a
head, F columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.kernels.prompt_packing import PackedPrompts


@dataclass
class PaddedIndex:
    """Rows of a matrix, padded to [B, W].

    Args:
        row_BW: Row of the matrix at each element; an arbitrary one at padding.
        is_real_BW: Whether an element is not padding.
    """

    row_BW: Tensor
    is_real_BW: Tensor

    @classmethod
    def of(cls, rows: Jagged) -> "PaddedIndex":
        """Pads lists of row numbers to the longest; not all of them empty."""
        lengths_B1 = rows.lengths.unsqueeze(1)
        column_W = torch.arange(int(lengths_B1.max()), device=lengths_B1.device)
        is_real_BW = column_W < lengths_B1
        index_BW = torch.where(is_real_BW, rows.offsets[:-1].unsqueeze(1) + column_W, 0)
        return cls(rows.values[index_BW], is_real_BW)

    def gather(self, matrix_YF: Tensor) -> Tensor:
        """Rows of a matrix, padded to [B, W, F]."""
        return matrix_YF.index_select(0, self.row_BW.flatten()).unflatten(0, self.row_BW.shape)


@dataclass
class MaskBucket:
    """Prompts of similar length.

    Args:
        queries: Their querying tokens, as rows of all queries.
        keys: All their tokens, as rows of the keys after the prefix.
        is_masked_BQK: Whether a query does not attend to a token of its prompt.
    """

    queries: PaddedIndex
    keys: PaddedIndex
    is_masked_BQK: Tensor


@dataclass
class PackedMask:
    """Which tokens the querying tokens attend to, made once for all layers.

    Args:
        query_tokens_Y: The querying tokens, counted from the end of the prefix.
        prefix_length: Tokens of the prefix P; all queries attend to all of them.
        buckets: The prompts.
        padded_index_Y: Index of each query in the flattened padded rows of all buckets, one bucket after another.
    """

    query_tokens_Y: Tensor
    prefix_length: int
    buckets: list[MaskBucket]
    padded_index_Y: Tensor

    @classmethod
    def of(cls, packed: PackedPrompts, query_tokens_Y: Tensor) -> "PackedMask":
        """The mask of some querying tokens, at least one of each prompt."""
        tokens_X = torch.arange(packed.num_tokens, device=query_tokens_Y.device)
        keys, queries = packed.by_prompt(tokens_X), packed.by_prompt(query_tokens_Y)
        # One bucket for each power of two: its longest prompt is less than twice its shortest.
        bucket_B = torch.log2(keys.lengths.float()).floor()
        buckets = []
        for number in torch.unique(bucket_B):
            prompts = torch.nonzero(bucket_B == number).squeeze(1)
            padded_queries, padded_keys = PaddedIndex.of(queries.select(prompts)), PaddedIndex.of(keys.select(prompts))
            is_masked_BQK = _masked(packed, query_tokens_Y, padded_queries, padded_keys)
            buckets.append(MaskBucket(padded_queries, padded_keys, is_masked_BQK))
        return cls(query_tokens_Y, packed.prefix_P.numel(), buckets, _padded_index(buckets, query_tokens_Y))


def _masked(packed: PackedPrompts, query_tokens_Y: Tensor, queries: PaddedIndex, keys: PaddedIndex) -> Tensor:
    attends_BQK = packed.attends(query_tokens_Y[queries.row_BW].unsqueeze(2), keys.row_BW.unsqueeze(1))
    # A padded query attends to its whole prompt: its result is not used, but a softmax over nothing would be NaN.
    attends_BQK |= ~queries.is_real_BW.unsqueeze(2)
    return ~(attends_BQK & keys.is_real_BW.unsqueeze(1))


def _padded_index(buckets: list[MaskBucket], query_tokens_Y: Tensor) -> Tensor:
    """Index of each query in the concatenated results of all buckets."""
    is_real = torch.cat([bucket.queries.is_real_BW.flatten() for bucket in buckets])
    query = torch.cat([bucket.queries.row_BW.flatten() for bucket in buckets])
    padded_index_Y = torch.empty_like(query_tokens_Y)
    padded_index_Y[query[is_real]] = torch.nonzero(is_real).squeeze(1)
    return padded_index_Y


def packed_attention(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scale: float) -> Tensor:
    """Attention of a packed row, in transformers' form.

    Args:
        query: Of the whole row or, in a layer whose other results are not used, of the querying tokens alone,
            [1, h, Z or Y, E].
        key: Of the whole row, prefix first, [1, G, Z, E].
        value: Likewise.
        mask: Which tokens attend to which.
        scale: Factor of the scores.

    Returns:
        Results, [1, Z or Y, h, E].
    """
    query_, key_, value_ = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    num_prefix_queries = query_.shape[0] - mask.query_tokens_Y.numel()
    result = _attend_after_prefix(query_[num_prefix_queries:], key_, value_, mask, scale)
    if num_prefix_queries:
        of_prefix = _attend_within_prefix(query_[:num_prefix_queries], key_, value_, scale)
        result = torch.cat([of_prefix, result])
    return result.unsqueeze(0)


def _attend_within_prefix(query_PhE: Tensor, key_ZGE: Tensor, value_ZGE: Tensor, scale: float) -> Tensor:
    """Causal attention of the prefix to itself, [P, h, E]."""
    prefix = query_PhE.shape[0]
    query, key, value = (tensor[:prefix].transpose(0, 1).unsqueeze(0) for tensor in (query_PhE, key_ZGE, value_ZGE))
    result = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return result[0].transpose(0, 1)


def _attend_after_prefix(
    query_YhE: Tensor, key_ZGE: Tensor, value_ZGE: Tensor, mask: PackedMask, scale: float
) -> Tensor:
    """Attention of the querying tokens, [Y, h, E]."""
    prefix_key, prefix_value = (tensor[: mask.prefix_length].transpose(0, 1) for tensor in (key_ZGE, value_ZGE))
    own_key, own_value = (tensor[mask.prefix_length :].flatten(1) for tensor in (key_ZGE, value_ZGE))
    query = (query_YhE * scale).flatten(1)
    results = [
        _attend_in_bucket(bucket, query, own_key, own_value, prefix_key, prefix_value) for bucket in mask.buckets
    ]
    return torch.cat(results).index_select(0, mask.padded_index_Y).view(query_YhE.shape)


def _attend_in_bucket(
    bucket: MaskBucket,
    query_YF: Tensor,
    own_key_XF: Tensor,
    own_value_XF: Tensor,
    prefix_key_GPE: Tensor,
    prefix_value_GPE: Tensor,
) -> Tensor:
    """Results of one bucket, padded: [B * Q, h * E]."""
    groups, prefix, width = prefix_key_GPE.shape
    batch, queries, keys = bucket.is_masked_BQK.shape
    heads = query_YF.shape[1] // (groups * width)
    scores_shape = (groups, batch, heads, queries)

    query = bucket.queries.gather(query_YF).view(batch, queries, groups, heads, width).permute(2, 0, 3, 1, 4)
    query = query.reshape(groups, batch, heads * queries, width)
    key, value = (
        bucket.keys.gather(own).view(batch, keys, groups, width).permute(2, 0, 1, 3)
        for own in (own_key_XF, own_value_XF)
    )
    prefix_scores = (query.flatten(1, 2) @ prefix_key_GPE.transpose(1, 2)).view(*scores_shape, prefix)
    own_scores = (query @ key.transpose(2, 3)).view(*scores_shape, keys)
    own_scores = own_scores.masked_fill(bucket.is_masked_BQK.unsqueeze(1), float("-inf"))
    weights = torch.cat([prefix_scores, own_scores], dim=4).softmax(dim=4).flatten(2, 3)
    of_prefix = (weights[..., :prefix].flatten(1, 2) @ prefix_value_GPE).view_as(query)
    result = of_prefix + weights[..., prefix:] @ value
    return result.view(*scores_shape, width).permute(1, 3, 0, 2, 4).reshape(batch * queries, -1)
