"""Grouped-query attention on the CPU, in the form of a transformers attention function.

transformers copies keys and values once for each query head before it calls torch's kernel, and that kernel is slow in
bfloat16 on a CPU. Here:

    packed prompts         `packed_attention`
    float32 on a CPU       torch's kernel with shared keys and values (enable_gqa), nothing copied
    bfloat16 on a CPU      the R query heads of a group are rows of one product with their common keys:
                           [B, G, R * T, E] @ [B, G, E, S]
    anything else          transformers' own function

Shapes: B prompts, G key and value heads, R query heads of each, T queries, S keys, E columns of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from llmgr_rec.kernels.packed_attention import PackedMask, packed_attention

GROUPED_QUERY_ATTENTION = "llmgr_grouped"
# Arguments that do not change the result. With any other one, transformers' own function is called.
_IGNORED = {
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "is_causal",
}


def grouped_query_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_mask: PackedMask | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in transformers' form.

    Args:
        module: The attention layer.
        query: [B, G * R, T, E].
        key: [B, G, S, E].
        value: [B, G, S, E].
        attention_mask: Which keys each query attends to, boolean and the same for all heads, [B or 1, 1, T, S]; None
            for all keys up to its own position.
        dropout: Dropout on the attention weights.
        scaling: Factor of the scores; None for 1 / sqrt(E).
        packed_mask: Which tokens of packed prompts attend to which; `attention_mask` is ignored then.
        kwargs: Arguments of other kinds of attention.

    Returns:
        Results [B, T, G * R, E], and no attention weights.
    """
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if packed_mask is not None:
        return packed_attention(query, key, value, packed_mask, scale), None
    special = {name for name, given in kwargs.items() if given is not None and given is not False} - _IGNORED
    simple = query.device.type == "cpu" and not dropout and not special and query.dtype == key.dtype
    if not simple or attention_mask is None or attention_mask.dtype != torch.bool or attention_mask.shape[1] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    attend = _shared_heads_sdpa if query.dtype == torch.float32 else _one_product_a_group
    return attend(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None


def _shared_heads_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Torch's kernel, [B, G * R, T, E]."""
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def _one_product_a_group(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Two products and a softmax, [B, G * R, T, E]."""
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1:3]
    rows = heads // groups * queries
    scores = (query * scale).reshape(batch, groups, rows, width) @ key.transpose(2, 3)
    scores = scores.view(batch, heads, queries, keys).masked_fill(~mask, float("-inf"))
    result = scores.softmax(dim=-1).view(batch, groups, rows, keys) @ value
    return result.view(batch, heads, queries, width)


def use_grouped_query_attention(decoder: PreTrainedModel) -> bool:
    """Sets the attention of a decoder that runs torch's attention to `grouped_query_attention`.

    Args:
        decoder: The decoder, changed in place; one whose attention cannot be replaced stays as it is.

    Returns:
        Whether it was replaced.
    """
    text_config = decoder.config.get_text_config(decoder=True)
    if getattr(text_config, "_attn_implementation", None) != "sdpa" or not decoder._supports_attention_backend:
        return False
    AttentionInterface.register(GROUPED_QUERY_ATTENTION, grouped_query_attention)
    AttentionMaskInterface.register(GROUPED_QUERY_ATTENTION, sdpa_mask)
    decoder.set_attn_implementation(GROUPED_QUERY_ATTENTION)
    return True
