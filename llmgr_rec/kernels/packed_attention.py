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

Queries, keys and values of all buckets are gathered in this layout by one selection of rows each, and the results are
selected back. The gradients are written out: each row is gathered once, so they are selections, too, in place of sums
over an index.

Shapes: P tokens of the prefix, X tokens after it, Z = P + X, Y querying tokens, B prompts of a bucket, Q and K the
most querying tokens and tokens of any of them, G key and value heads, R query heads of each, h = G * R, E columns of a
head, M and N gathered rows of queries and of keys, S rows of a product, F columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        query_padding: Rows after the last query, whose results are zeros.
        key_padding: Rows after the last token, to which nothing attends.
    """

    query_tokens_Y: Tensor
    prefix_length: int
    buckets: list[MaskBucket]
    query_padding: int = 0
    key_padding: int = 0
    _rows: dict[tuple[int, int], "_Rows"] = field(default_factory=dict)

    @classmethod
    def of(
        cls, packed: PackedPrompts, query_tokens_Y: Tensor, query_padding: int = 0, key_padding: int = 0
    ) -> "PackedMask":
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
        return cls(query_tokens_Y, packed.prefix_P.numel(), buckets, query_padding, key_padding)

    def rows(self, groups: int, heads_of_group: int) -> "_Rows":
        """Which rows are gathered for a number of heads; made once for all layers."""
        numbers = (groups, heads_of_group)
        if numbers not in self._rows:
            self._rows[numbers] = _Rows.of(self.buckets, groups, heads_of_group)
        return self._rows[numbers]


def _masked(packed: PackedPrompts, query_tokens_Y: Tensor, queries: PaddedIndex, keys: PaddedIndex) -> Tensor:
    attends_BQK = packed.attends(query_tokens_Y[queries.row_BW].unsqueeze(2), keys.row_BW.unsqueeze(1))
    # A padded query attends to its whole prompt: its result is not used, but a softmax over nothing would be NaN.
    attends_BQK |= ~queries.is_real_BW.unsqueeze(2)
    return ~(attends_BQK & keys.is_real_BW.unsqueeze(1))


@dataclass
class _Rows:
    """Rows that are gathered, one bucket after another: those of token t are t * h + head, and t * G + group of keys.

    Args:
        query_M: Row of each gathered query.
        is_real_M1: 1 for a query, 0 for padding.
        key_N: Row of each gathered key and value.
        of_query: Gathered row of each query, [Y * h].
        of_key: Gathered row of each key, [X * G].
    """

    query_M: Tensor
    is_real_M1: Tensor
    key_N: Tensor
    of_query: Tensor
    of_key: Tensor

    @classmethod
    def of(cls, buckets: list[MaskBucket], groups: int, heads_of_group: int) -> "_Rows":
        """The rows for some buckets."""
        device = buckets[0].is_masked_BQK.device
        head_GR = torch.arange(groups * heads_of_group, device=device).view(groups, 1, heads_of_group, 1)
        group_G11 = torch.arange(groups, device=device).view(groups, 1, 1)
        queries, keys = [], []
        for bucket in buckets:
            rows_BQ, rows_BK = bucket.queries, bucket.keys
            row_GBRQ = rows_BQ.row_BW.unsqueeze(1) * head_GR.numel() + head_GR
            real_GBRQ = rows_BQ.is_real_BW.unsqueeze(1).expand_as(row_GBRQ)
            queries.append((row_GBRQ.flatten(), real_GBRQ.flatten()))
            row_GBK = rows_BK.row_BW * groups + group_G11
            keys.append((row_GBK.flatten(), rows_BK.is_real_BW.expand_as(row_GBK).flatten()))
        (query_M, is_real_M), (key_N, is_real_N) = (
            tuple(map(torch.cat, zip(*parts, strict=True))) for parts in (queries, keys)
        )
        return cls(query_M, is_real_M.unsqueeze(1), key_N, _gathered(query_M, is_real_M), _gathered(key_N, is_real_N))


def _gathered(row_N: Tensor, is_real_N: Tensor) -> Tensor:
    """The gathered row of each row."""
    real = torch.nonzero(is_real_N).squeeze(1)
    gathered = torch.empty_like(real)
    gathered[row_N[real]] = real
    return gathered


def packed_attention(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scale: float) -> Tensor:
    """Attention of a packed row, in transformers' form.

    Args:
        query: Of the whole row or, in a layer whose other results are not used, of the querying tokens alone,
            [1, h, Z or Y, E]; here and below, Z and Y include the padding of the mask.
        key: Of the whole row, prefix first, [1, G, Z, E].
        value: Likewise.
        mask: Which tokens attend to which.
        scale: Factor of the scores.

    Returns:
        Results, [1, Z or Y, h, E]; differentiable once.
    """
    query_, key_, value_ = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    # Products are in the format of the inputs; autocast would widen the softmax.
    with torch.autocast(query.device.type, enabled=False):
        result: Tensor = _PackedAttention.apply(query_, key_, value_, mask, scale)
    return result.unsqueeze(0)


@dataclass
class _Part:
    """Queries that are multiplied together: a bucket, or the prefix.

    Args:
        queries: Their range of the gathered queries.
        keys: Their range of the gathered keys; empty for the prefix, which only attends to itself.
        shape: (G, B, R, Q, K).
        is_masked: Own tokens, [B, 1, Q, K], or tokens of the prefix, [P, P], that a query does not attend to.
    """

    queries: slice
    keys: slice
    shape: tuple[int, ...]
    is_masked: Tensor

    def weights(self, query_MSE: Tensor, prefix_key_GPE: Tensor, key_NE: Tensor) -> Tensor:
        """Softmax of the scores of prefix and own tokens, [G * B * R * Q, P + K]."""
        groups, _, heads, queries, keys = self.shape
        query_GSE = query_MSE.view(groups, -1, query_MSE.shape[-1])
        prefix_scores = query_GSE @ prefix_key_GPE.transpose(1, 2)
        if not keys:
            prefix_scores.view(groups, heads, queries, -1).masked_fill_(self.is_masked, float("-inf"))
            return prefix_scores.flatten(0, 1).softmax(1)
        own_scores = self.by_prompt(query_MSE) @ self.by_prompt(key_NE).transpose(1, 2)
        own_scores.view(self.shape).masked_fill_(self.is_masked, float("-inf"))
        return torch.cat([prefix_scores.flatten(0, 1), own_scores.flatten(0, 1)], dim=1).softmax(1)

    def by_prompt(self, rows_SF: Tensor) -> Tensor:
        """Rows as [G * B, rows of a prompt, F]."""
        return rows_SF.unflatten(0, (self.shape[0] * self.shape[1], -1))

    def by_group(self, rows_SF: Tensor) -> Tensor:
        """Rows as [G, rows of a group, F]."""
        return rows_SF.unflatten(0, (self.shape[0], -1))


def _parts(mask: PackedMask, groups: int, heads: int, with_prefix: bool) -> Iterator[_Part]:
    """The buckets and, if it has queries, the prefix, whose rows come last."""
    query = key = 0
    for bucket in mask.buckets:
        batch, queries, keys = bucket.is_masked_BQK.shape
        rows, own = groups * batch * heads * queries, groups * batch * keys
        shape = (groups, batch, heads, queries, keys)
        yield _Part(slice(query, query + rows), slice(key, key + own), shape, bucket.is_masked_BQK.unsqueeze(1))
        query, key = query + rows, key + own
    if with_prefix:
        length = mask.prefix_length
        is_later_PP = torch.ones(length, length, dtype=torch.bool, device=mask.query_tokens_Y.device).triu(1)
        rows = groups * heads * length
        yield _Part(slice(query, query + rows), slice(key, key), (groups, 1, heads, length, 0), is_later_PP)


def _products_dtype(inputs: Tensor) -> torch.dtype:
    """Dtype of the products: float32 for bfloat16 on a CPU, whose small products are no faster in bfloat16.

    There, torch also compiles a bfloat16 product anew for each of their shapes, which hardly ever repeat.
    """
    return torch.float32 if inputs.device.type == "cpu" and inputs.dtype == torch.bfloat16 else inputs.dtype


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_YhE: Tensor, key_ZGE: Tensor, value_ZGE: Tensor, mask: PackedMask, scale: float
    ) -> Tensor:
        layout = _Layout.of(query_YhE, key_ZGE, mask)
        dtype = _products_dtype(query_YhE)
        query_ME, key_NE, value_NE = (
            layout.gather_queries(query_YhE).to(dtype).mul_(scale),
            layout.gather_keys(key_ZGE).to(dtype),
            layout.gather_keys(value_ZGE).to(dtype),
        )
        prefix_key_GPE, prefix_value_GPE = layout.of_prefix(key_ZGE).to(dtype), layout.of_prefix(value_ZGE).to(dtype)
        result_ME = torch.empty_like(query_ME)
        weights = []
        for part in layout.parts:
            weight = part.weights(query_ME[part.queries], prefix_key_GPE, key_NE[part.keys])
            part_result = result_ME[part.queries]
            torch.bmm(part.by_group(weight[:, : layout.prefix]), prefix_value_GPE, out=part.by_group(part_result))
            if part.shape[4]:
                own_weight = part.by_prompt(weight[:, layout.prefix :])
                part.by_prompt(part_result).baddbmm_(own_weight, part.by_prompt(value_NE[part.keys]))
            weights.append(weight)
        ctx.layout, ctx.scale = layout, scale
        ctx.save_for_backward(query_ME, key_NE, value_NE, prefix_key_GPE, prefix_value_GPE, result_ME, *weights)
        return layout.scatter_queries(result_ME.to(query_YhE.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_YhE: Tensor) -> tuple[Tensor | None, ...]:
        layout: _Layout = ctx.layout
        query_ME, key_NE, value_NE, prefix_key_GPE, prefix_value_GPE, result_ME, *weights = ctx.saved_tensors
        dtype = gradient_YhE.dtype
        gradient_ME = layout.gather_queries(gradient_YhE).to(query_ME.dtype)
        # The results of padding are not used.
        gradient_ME[: layout.rows.query_M.numel()].mul_(layout.rows.is_real_M1)
        # The sum of weight times gradient over all keys, which the softmax subtracts, without a pass over the keys.
        mean_M1 = (gradient_ME * result_ME).sum(1, keepdim=True)
        to_query_ME = torch.empty_like(query_ME)
        to_key_NE, to_value_NE = torch.empty_like(key_NE), torch.empty_like(value_NE)
        to_prefix_key, to_prefix_value = torch.zeros_like(prefix_key_GPE), torch.zeros_like(prefix_value_GPE)
        for part, weight in zip(layout.parts, weights, strict=True):
            query, gradient, to_query = query_ME[part.queries], gradient_ME[part.queries], to_query_ME[part.queries]
            mean = mean_M1[part.queries]
            prefix_weight = part.by_group(weight[:, : layout.prefix])
            of_score = part.by_group(gradient) @ prefix_value_GPE.transpose(1, 2)
            of_score.sub_(part.by_group(mean)).mul_(prefix_weight)
            torch.bmm(of_score, prefix_key_GPE, out=part.by_group(to_query))
            to_prefix_key.baddbmm_(of_score.transpose(1, 2), part.by_group(query))
            to_prefix_value.baddbmm_(prefix_weight.transpose(1, 2), part.by_group(gradient))
            if part.shape[4]:
                own_weight = part.by_prompt(weight[:, layout.prefix :])
                query, gradient, mean = map(part.by_prompt, (query, gradient, mean))
                key, value = part.by_prompt(key_NE[part.keys]), part.by_prompt(value_NE[part.keys])
                of_score = (gradient @ value.transpose(1, 2)).sub_(mean).mul_(own_weight)
                part.by_prompt(to_query).baddbmm_(of_score, key)
                torch.bmm(of_score.transpose(1, 2), query, out=part.by_prompt(to_key_NE[part.keys]))
                torch.bmm(own_weight.transpose(1, 2), gradient, out=part.by_prompt(to_value_NE[part.keys]))
        return (
            layout.scatter_queries(to_query_ME.mul_(ctx.scale).to(dtype)),
            layout.scatter_keys(to_prefix_key.to(dtype), to_key_NE.to(dtype)),
            layout.scatter_keys(to_prefix_value.to(dtype), to_value_NE.to(dtype)),
            None,
            None,
        )


@dataclass
class _Layout:
    """Where queries, keys and values of a packed row stand in the products.

    Args:
        parts: What is multiplied together.
        rows: Gathered rows of the buckets.
        prefix: Tokens of the prefix P.
        prefix_queries: Querying tokens of the prefix, P or 0.
        groups: Key and value heads G.
        query_padding: Rows after the last query.
        key_padding: Rows after the last key.
    """

    parts: list[_Part]
    rows: _Rows
    prefix: int
    prefix_queries: int
    groups: int
    query_padding: int
    key_padding: int

    @classmethod
    def of(cls, query_YhE: Tensor, key_ZGE: Tensor, mask: PackedMask) -> "_Layout":
        """The layout of a packed row."""
        groups = key_ZGE.shape[1]
        heads = query_YhE.shape[1] // groups
        prefix_queries = query_YhE.shape[0] - mask.query_tokens_Y.numel() - mask.query_padding
        parts = list(_parts(mask, groups, heads, prefix_queries > 0))
        rows, prefix = mask.rows(groups, heads), mask.prefix_length
        return cls(parts, rows, prefix, prefix_queries, groups, mask.query_padding, mask.key_padding)

    def gather_queries(self, of_token_YhE: Tensor) -> Tensor:
        """Rows of the buckets, then those of the prefix as [G, R, P]."""
        rows = of_token_YhE[self.prefix_queries :].flatten(0, 1).index_select(0, self.rows.query_M)
        if not self.prefix_queries:
            return rows
        return torch.cat([rows, of_token_YhE[: self.prefix_queries].transpose(0, 1).flatten(0, 1)])

    def scatter_queries(self, rows_ME: Tensor) -> Tensor:
        """The inverse of `gather_queries`."""
        heads, width = self.groups * self.parts[0].shape[2], rows_ME.shape[1]
        of_token = rows_ME.index_select(0, self.rows.of_query).view(-1, heads, width)
        if not self.prefix_queries and not self.query_padding:
            return of_token
        of_prefix = rows_ME[self.rows.query_M.numel() :].view(heads, self.prefix_queries, width)
        return torch.cat([of_prefix.transpose(0, 1), of_token, of_token.new_zeros(self.query_padding, heads, width)])

    def gather_keys(self, of_token_ZGE: Tensor) -> Tensor:
        """Rows of the buckets."""
        return of_token_ZGE[self.prefix :].flatten(0, 1).index_select(0, self.rows.key_N)

    def of_prefix(self, of_token_ZGE: Tensor) -> Tensor:
        """Rows of the prefix, [G, P, E]."""
        return of_token_ZGE[: self.prefix].transpose(0, 1).contiguous()

    def scatter_keys(self, of_prefix_GPE: Tensor, rows_NE: Tensor) -> Tensor:
        """The inverse of `of_prefix` and `gather_keys`."""
        of_token = rows_NE.index_select(0, self.rows.of_key).view(-1, self.groups, rows_NE.shape[1])
        padding = of_token.new_zeros(self.key_padding, *of_token.shape[1:])
        return torch.cat([of_prefix_GPE.transpose(0, 1), of_token, padding])
