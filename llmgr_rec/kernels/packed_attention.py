"""Attention over packed prompts with one copy of their common prefix.

The keys of a query are the prefix, which all queries of the batch share, and the tokens of its own prompt. With
q, k, v of one head, a query's result is one softmax over both parts:

    [a, b] = softmax([q @ k_prefix.T,  q @ k_own.T + mask])
    result = a @ v_prefix + b @ v_own

The prefix part is one product of all queries with one [P, E] matrix. The own part is a batched product over prompts,
for which queries and keys are padded; prompts of similar length share a bucket, so there is little padding, and nothing
outside of attention is padded. The prefix is never copied for each prompt.

The query heads that share a key and value head (grouped-query attention), and their queries, are the rows of one
product. Those of a key head are M rows: one bucket after another, [B, R, Q] each, then the prefix, [R, P], if it has
queries.

    all queries         [G, M, E]          prefix keys  [G, P, E]      scores  [G, M, P]
    those of a bucket   [G, B, R * Q, E]   own keys  [G, B, K, E]      scores  [G, B, R * Q, K]

Queries, keys and values of all buckets are gathered in this layout by one selection of rows each, and the results are
selected back. The gradients are written out: each row is gathered once, so they are selections, too, in place of sums
over an index.

Products with the prefix are in the format of the inputs. Where that is bfloat16 on a CPU, M is rounded up, so that
there are few shapes, and the softmax and the small products with own keys are float32: these are hardly faster in
bfloat16, and torch would compile each anew for shapes that never repeat.

Shapes: P tokens of the prefix, X tokens after it, Z = P + X, Y querying tokens, B prompts of a bucket, Q and K the
most querying tokens and tokens of any of them, G key and value heads, R query heads of each, h = G * R, E columns of a
head, M and N gathered rows of queries and of keys, S rows of a product, F columns.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.kernels.prompt_packing import PackedPrompts
from llmgr_rec.kernels.row_padding import row_padding


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
    _layouts: dict[tuple[int, int, bool, torch.dtype], "_Layout"] = field(default_factory=dict)

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

    def layout(self, query_YhE: Tensor, key_ZGE: Tensor) -> "_Layout":
        """Where the rows of queries and keys stand in the products; made once for all layers of one kind."""
        groups = key_ZGE.shape[1]
        heads = query_YhE.shape[1] // groups
        has_prefix = query_YhE.shape[0] > self.query_tokens_Y.numel() + self.query_padding
        kind = (groups, heads, has_prefix, query_YhE.dtype)
        if kind not in self._layouts:
            self._layouts[kind] = _Layout.of(self, groups, heads, has_prefix, query_YhE.dtype)
        return self._layouts[kind]


def _masked(packed: PackedPrompts, query_tokens_Y: Tensor, queries: PaddedIndex, keys: PaddedIndex) -> Tensor:
    attends_BQK = packed.attends(query_tokens_Y[queries.row_BW].unsqueeze(2), keys.row_BW.unsqueeze(1))
    # A padded query attends to its whole prompt: its result is not used, but a softmax over nothing would be NaN.
    attends_BQK |= ~queries.is_real_BW.unsqueeze(2)
    return ~(attends_BQK & keys.is_real_BW.unsqueeze(1))


@dataclass
class _Part:
    """The queries of a bucket in the products.

    Args:
        queries: Their range of the M rows of each key head.
        keys: Their range of the gathered keys.
        shape: (G, B, R, Q, K).
        is_masked: Own tokens that a query does not attend to, [B, 1, Q, K].
    """

    queries: slice
    keys: slice
    shape: tuple[int, int, int, int, int]
    is_masked: Tensor

    def own_rows(self, rows_GME: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of each prompt, [G * B, R * Q, E], in the format of the products with own keys."""
        groups, batch = self.shape[:2]
        return rows_GME[:, self.queries].to(dtype).reshape(groups * batch, -1, rows_GME.shape[2])

    def own_keys(self, rows_NE: Tensor) -> Tensor:
        """Keys or values of each prompt, [G * B, K, E]."""
        groups, batch, *_, keys = self.shape
        return rows_NE[self.keys].view(groups * batch, keys, -1)

    def add_to(self, rows_GME: Tensor, own: Tensor) -> None:
        """Adds what `own_rows` has the form of."""
        rows_GME[:, self.queries].add_(own.view(self.shape[0], -1, own.shape[2]))

    def weights(self, scores_GMP: Tensor, own_scores: Tensor) -> Tensor:
        """Softmax over prefix and own tokens.

        Args:
            scores_GMP: Scores of the prefix; on return its weights.
            own_scores: Scores of own tokens, [G * B, R * Q, K].

        Returns:
            Weights of own tokens, likewise.
        """
        own_scores.view(self.shape).masked_fill_(self.is_masked, float("-inf"))
        prefix_scores, prefix = scores_GMP[:, self.queries], scores_GMP.shape[2]
        own = own_scores.view(self.shape[0], -1, own_scores.shape[2])
        weights = torch.cat([prefix_scores.to(own.dtype), own], dim=2).softmax(2)
        prefix_scores.copy_(weights[:, :, :prefix])
        return weights[:, :, prefix:].reshape(own_scores.shape)


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
    query_, key_, value_ = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    # Products are in the format of the inputs; autocast would widen the softmax.
    with torch.autocast(query.device.type, enabled=False):
        result: Tensor = _PackedAttention.apply(query_, key_, value_, mask, scale)
    return result.unsqueeze(0)


def _own_dtype(inputs: Tensor) -> torch.dtype:
    """Format of the softmax and of products with own keys: float32 for bfloat16 on a CPU."""
    return torch.float32 if inputs.device.type == "cpu" and inputs.dtype == torch.bfloat16 else inputs.dtype


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_YhE: Tensor, key_ZGE: Tensor, value_ZGE: Tensor, mask: PackedMask, scale: float
    ) -> Tensor:
        layout, own_dtype = mask.layout(query_YhE, key_ZGE), _own_dtype(query_YhE)
        query_GME = layout.gather_queries(query_YhE)
        # There are fewer keys than queries to scale.
        key_NE, prefix_key_GPE = (
            layout.gather_keys(key_ZGE).to(own_dtype).mul_(scale),
            layout.of_prefix(key_ZGE).mul_(scale),
        )
        value_NE, prefix_value_GPE = layout.gather_keys(value_ZGE).to(own_dtype), layout.of_prefix(value_ZGE)
        weights_GMP = query_GME @ prefix_key_GPE.transpose(1, 2)
        own_weights = []
        for part in layout.parts:
            own_scores = part.own_rows(query_GME, own_dtype) @ part.own_keys(key_NE).transpose(1, 2)
            own_weights.append(part.weights(weights_GMP, own_scores))
        if layout.prefix_queries is not None:
            layout.weights_in_prefix(weights_GMP, own_dtype)
        result_GME = weights_GMP @ prefix_value_GPE
        for part, weights in zip(layout.parts, own_weights, strict=True):
            part.add_to(result_GME, weights @ part.own_keys(value_NE))
        ctx.layout, ctx.scale, ctx.own_dtype = layout, scale, own_dtype
        saved = (query_GME, key_NE, value_NE, prefix_key_GPE, prefix_value_GPE, result_GME, weights_GMP)
        ctx.save_for_backward(*saved, *own_weights)
        return layout.scatter_queries(result_GME)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_YhE: Tensor) -> tuple[Tensor | None, ...]:
        layout: _Layout = ctx.layout
        query_GME, key_NE, value_NE, prefix_key_GPE, prefix_value_GPE, result_GME, weights_GMP, *own_weights = (
            ctx.saved_tensors
        )
        # The results of padding are not used.
        gradient_GME = layout.gather_queries(gradient_YhE).mul_(layout.is_real_GM1)
        # The sum of weight times gradient over all keys, which the softmax subtracts, without a pass over the keys.
        mean_GM1 = (gradient_GME * result_GME).sum(2, keepdim=True, dtype=ctx.own_dtype)
        of_score_GMP = gradient_GME @ prefix_value_GPE.transpose(1, 2)
        of_score_GMP.sub_(mean_GM1).mul_(weights_GMP)
        to_query_GME = of_score_GMP @ prefix_key_GPE
        to_prefix_key = (of_score_GMP.transpose(1, 2) @ query_GME).mul_(ctx.scale)
        to_prefix_value = weights_GMP.transpose(1, 2) @ gradient_GME
        to_key_NE, to_value_NE = torch.empty_like(key_NE), torch.empty_like(value_NE)
        for part, weights in zip(layout.parts, own_weights, strict=True):
            query, gradient = (part.own_rows(rows, ctx.own_dtype) for rows in (query_GME, gradient_GME))
            key, value = part.own_keys(key_NE), part.own_keys(value_NE)
            of_score = gradient @ value.transpose(1, 2)
            of_score.sub_(part.own_rows(mean_GM1, ctx.own_dtype)).mul_(weights)
            part.add_to(to_query_GME, of_score @ key)
            torch.bmm(of_score.transpose(1, 2), query, out=part.own_keys(to_key_NE))
            torch.bmm(weights.transpose(1, 2), gradient, out=part.own_keys(to_value_NE))
        dtype = gradient_YhE.dtype
        return (
            layout.scatter_queries(to_query_GME),
            layout.scatter_keys(to_prefix_key, to_key_NE.mul_(ctx.scale).to(dtype)),
            layout.scatter_keys(to_prefix_value, to_value_NE.to(dtype)),
            None,
            None,
        )


@dataclass
class _Layout:
    """Where queries, keys and values of a packed row stand in the products.

    Row t * h + head of all queries is that of token t, and row t * G + group of all keys.

    Args:
        parts: The buckets.
        prefix: Tokens of the prefix P.
        prefix_queries: Range of the prefix among the M rows; None if it has no queries.
        query_GM: Row of each gathered query; an arbitrary one at padding.
        is_real_GM1: Whether a gathered query is not padding.
        of_query: Gathered row of each query, [Y * h].
        key_N: Row of each gathered key and value, without the rows of the prefix.
        of_key: Gathered row of each key, [X * G].
        query_padding: Rows after the last query.
        key_padding: Rows after the last key.
    """

    parts: list[_Part]
    prefix: int
    prefix_queries: slice | None
    query_GM: Tensor
    is_real_GM1: Tensor
    of_query: Tensor
    key_N: Tensor
    of_key: Tensor
    query_padding: int
    key_padding: int

    @classmethod
    def of(cls, mask: PackedMask, groups: int, heads: int, has_prefix: bool, dtype: torch.dtype) -> "_Layout":
        """The layout of a packed row, for products in a number format."""
        device, prefix = mask.query_tokens_Y.device, mask.prefix_length
        head_GR = torch.arange(groups * heads, device=device).view(groups, 1, heads, 1)
        group_G11 = torch.arange(groups, device=device).view(groups, 1, 1)
        parts, queries, keys = [], [], []
        row = key = 0
        for bucket in mask.buckets:
            token_BQ = bucket.queries.row_BW + (prefix if has_prefix else 0)
            row_GBRQ = token_BQ.unsqueeze(1) * head_GR.numel() + head_GR
            queries.append((row_GBRQ, bucket.queries.is_real_BW.unsqueeze(1).expand_as(row_GBRQ)))
            row_GBK = bucket.keys.row_BW * groups + group_G11
            keys.append((row_GBK.flatten(), bucket.keys.is_real_BW.expand_as(row_GBK).flatten()))
            batch, width, own = bucket.is_masked_BQK.shape
            ranges = slice(row, row + batch * heads * width), slice(key, key + row_GBK.numel())
            shape = (groups, batch, heads, width, own)
            parts.append(_Part(*ranges, shape, bucket.is_masked_BQK.unsqueeze(1)))
            row, key = ranges[0].stop, ranges[1].stop
        if has_prefix:
            row_G1RP = torch.arange(prefix, device=device) * head_GR.numel() + head_GR
            queries.append((row_G1RP, torch.ones_like(row_G1RP, dtype=torch.bool)))
        rows = sum(numbers[0].numel() for numbers, _ in queries)
        zeros = head_GR.new_zeros(groups, row_padding(rows, dtype, device))
        queries.append((zeros, zeros.bool()))
        query_GM, is_real_GM = (
            torch.cat([part.flatten(1) for part in of_parts], dim=1) for of_parts in zip(*queries, strict=True)
        )
        key_N, is_real_N = (torch.cat(of_parts) for of_parts in zip(*keys, strict=True))
        return cls(
            parts,
            prefix,
            slice(row, rows) if has_prefix else None,
            query_GM,
            is_real_GM.unsqueeze(2),
            _gathered(query_GM.flatten(), is_real_GM.flatten()),
            key_N,
            _gathered(key_N, is_real_N),
            mask.query_padding,
            mask.key_padding,
        )

    def gather_queries(self, of_token_YhE: Tensor) -> Tensor:
        """Rows of the queries, [G, M, E]."""
        return of_token_YhE.flatten(0, 1).index_select(0, self.query_GM.view(-1)).unflatten(0, self.query_GM.shape)

    def scatter_queries(self, rows_GME: Tensor) -> Tensor:
        """The inverse of `gather_queries`, [Y, h, E], with zeros at the padding."""
        heads = self.query_GM.shape[0] * self.parts[0].shape[2]
        of_token = rows_GME.flatten(0, 1).index_select(0, self.of_query).view(-1, heads, rows_GME.shape[2])
        return functional.pad(of_token, (0, 0, 0, 0, 0, self.query_padding)) if self.query_padding else of_token

    def weights_in_prefix(self, scores_GMP: Tensor, dtype: torch.dtype) -> None:
        """Turns scores of the prefix's own queries into weights, in place; each attends to the tokens up to itself."""
        of_prefix_GSP = scores_GMP[:, self.prefix_queries]
        is_later_PP = torch.ones(self.prefix, self.prefix, dtype=torch.bool, device=scores_GMP.device).triu(1)
        of_prefix_GSP.unflatten(1, (-1, self.prefix)).masked_fill_(is_later_PP, float("-inf"))
        of_prefix_GSP.copy_(of_prefix_GSP.softmax(2, dtype=dtype))

    def gather_keys(self, of_token_ZGE: Tensor) -> Tensor:
        """Rows of the buckets."""
        return of_token_ZGE[self.prefix :].flatten(0, 1).index_select(0, self.key_N)

    def of_prefix(self, of_token_ZGE: Tensor) -> Tensor:
        """A copy of the rows of the prefix, [G, P, E]."""
        return of_token_ZGE[: self.prefix].transpose(0, 1).clone(memory_format=torch.contiguous_format)

    def scatter_keys(self, of_prefix_GPE: Tensor, rows_NE: Tensor) -> Tensor:
        """The inverse of `of_prefix` and `gather_keys`."""
        of_token = rows_NE.index_select(0, self.of_key).view(-1, of_prefix_GPE.shape[0], rows_NE.shape[1])
        padding = of_token.new_zeros(self.key_padding, *of_token.shape[1:])
        return torch.cat([of_prefix_GPE.transpose(0, 1), of_token, padding])


def _gathered(row_N: Tensor, is_real_N: Tensor) -> Tensor:
    """The gathered row of each row."""
    real = torch.nonzero(is_real_N).squeeze(1)
    gathered = torch.empty_like(real)
    gathered[row_N[real]] = real
    return gathered
