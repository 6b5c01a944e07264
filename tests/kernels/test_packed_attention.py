"""Packed attention against one softmax for each query and head."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.kernels.packed_attention import PackedMask, packed_attention
from llmgr_rec.kernels.prompt_packing import PackedPrompts

GROUPS, HEADS_OF_GROUP, WIDTH, SCALE = 2, 3, 4, 0.6


def reference(query: Tensor, key: Tensor, value: Tensor, packed: PackedPrompts, tokens: list[int]) -> Tensor:
    """Results of some tokens of the whole row, query by query and head by head, [tokens, h, E]."""
    prefix = packed.prefix_P.numel()
    results = []
    for row, token in enumerate(tokens):
        if token < prefix:
            keys = list(range(token + 1))
        else:
            others_X = torch.arange(packed.num_tokens)
            attended = others_X[packed.attends(torch.tensor(token - prefix), others_X)]
            keys = [*range(prefix), *(attended + prefix).tolist()]
        heads = []
        for head in range(GROUPS * HEADS_OF_GROUP):
            group = head // HEADS_OF_GROUP
            weights = torch.softmax(key[0, group, keys] @ query[0, head, row] * SCALE, 0)
            heads.append(weights @ value[0, group, keys])
        results.append(torch.stack(heads))
    return torch.stack(results)


def prompts_of(lengths: list[int], prefix: int, suffix: int | None) -> PackedPrompts:
    """Separate prompts where `suffix` is None, else contexts with suffixes of so many tokens."""
    rows = Jagged.from_lengths(torch.arange(sum(lengths)), torch.tensor(lengths))
    if suffix is None:
        return PackedPrompts.separate(torch.arange(prefix), rows)
    suffixes = Jagged.from_lengths(torch.zeros(sum(lengths) * suffix).long(), torch.full((sum(lengths),), suffix))
    return PackedPrompts.in_one_pass(torch.arange(prefix), rows, suffixes)


def check(packed: PackedPrompts, query_tokens_Y: Tensor, whole_row: bool, seed: int) -> None:
    """Compares results and gradients, with rows of padding after those of the reference."""
    generator = torch.Generator().manual_seed(seed)
    prefix = packed.prefix_P.numel()
    tokens = [*(range(prefix) if whole_row else []), *(query_tokens_Y + prefix).tolist()]

    def draw(heads: int, rows: int) -> Tensor:
        return torch.randn(1, heads, rows, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()

    padding = (seed % 3, seed // 2 % 3)
    inputs = (
        draw(GROUPS * HEADS_OF_GROUP, len(tokens) + padding[0]),
        draw(GROUPS, prefix + packed.num_tokens + padding[1]),
        draw(GROUPS, prefix + packed.num_tokens + padding[1]),
    )
    actual = packed_attention(*inputs, PackedMask.of(packed, query_tokens_Y, *padding), SCALE)[0]
    real = reference(*inputs, packed, tokens)
    expected = torch.cat([real, real.new_zeros(padding[0], *real.shape[1:])])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(
        torch.autograd.grad((actual * direction).sum(), inputs),
        torch.autograd.grad((expected * direction).sum(), inputs),
        rtol=0,
        atol=1e-12,
    )


lengths_strategy = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(lengths_strategy, st.integers(0, 3), st.sampled_from([None, 0, 1, 2]), st.integers(0, 9))
def test_the_whole_row_agrees(lengths: list[int], prefix: int, suffix: int | None, seed: int) -> None:
    packed = prompts_of(lengths, prefix, suffix)
    check(packed, torch.arange(packed.num_tokens), True, seed)


@settings(max_examples=30, deadline=None)
@given(lengths_strategy, st.integers(0, 3), st.sampled_from([None, 0, 1, 2]), st.integers(0, 9))
def test_the_outputs_agree(lengths: list[int], prefix: int, suffix: int | None, seed: int) -> None:
    packed = prompts_of(lengths, prefix, suffix)
    check(packed, packed.output_token_C, False, seed)


def test_bfloat16_on_a_cpu_differs_by_rounding_and_has_few_shapes() -> None:
    torch.manual_seed(0)
    shapes = set()
    for lengths in ([3, 5], [4, 4], [2, 6]):
        packed = prompts_of(lengths, 2, 1)
        mask = PackedMask.of(packed, torch.arange(packed.num_tokens))
        exact = [torch.randn(1, heads, packed.num_tokens + 2, WIDTH).bfloat16().float() for heads in (6, 2, 2)]
        direction = torch.randn(1, packed.num_tokens + 2, 6, WIDTH)
        found = []
        for dtype in (torch.bfloat16, torch.float32):
            inputs = [tensor.to(dtype).requires_grad_() for tensor in exact]
            result = packed_attention(*inputs, mask, SCALE)
            gradients = torch.autograd.grad((result * direction.to(dtype)).sum(), inputs)
            found.append([result.detach(), *gradients])
        shapes.add(mask.layout(*(tensor[0].transpose(0, 1).bfloat16() for tensor in exact[:2])).query_GM.shape)
        for one, other in zip(*found, strict=True):
            assert one.dtype == torch.bfloat16
            assert (one.float() - other).norm() < 0.01 * other.norm()
    # Three times 18 tokens, rounded up; in float32 there is no padding.
    assert shapes == {(GROUPS, 64)}
    assert mask.layout(*(tensor[0].transpose(0, 1) for tensor in exact[:2])).query_GM.shape == (GROUPS, 54)


@pytest.mark.parametrize("suffix", [None, 2])
def test_a_bucket_holds_prompts_of_similar_length(suffix: int | None) -> None:
    packed = prompts_of([1, 9, 2, 3, 8], 2, suffix)
    mask = PackedMask.of(packed, torch.arange(packed.num_tokens))
    lengths = [bucket.keys.is_real_BW.sum(dim=1) for bucket in mask.buckets]
    assert all(bucket.max() < 2 * bucket.min() for bucket in lengths)
    assert sum(bucket.numel() for bucket in lengths) == 5
