"""Attention on the CPU for decoders whose query heads share key and value heads.

transformers copies keys and values once for each query head before it calls torch's kernel, and that kernel is slow in
bfloat16 on a CPU. Here the query heads of a group are rows of one product with their common keys.

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

from llmgr_rec.kernels.packed_attention import View, packed_attention

GROUPED = "llmgr_grouped"
# What `grouped_attention` computes itself; with any other argument that changes the result, transformers' own runs.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "is_causal"}


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    view: View | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in transformers' form.

    Args:
        module: The attention layer.
        query: [B, G * R, T, E].
        key: [B, G, S, E].
        value: [B, G, S, E].
        attention_mask: What each query may see, boolean and the same for all heads, [B or 1, 1, T, S]; None for all
            keys up to its own place.
        dropout: Dropout on the attention weights.
        scaling: Factor of the scores; None for 1 / sqrt(E).
        view: For packed prompts, who sees what; the mask is not read then.
        kwargs: Arguments of other kinds of attention.

    Returns:
        Results [B, T, G * R, E], and no attention weights.
    """
    if view is not None:
        return packed_attention(query, key, value, view, query.shape[3] ** -0.5 if scaling is None else scaling), None
    special = {name for name, given in kwargs.items() if given is not None and given is not False} - _HARMLESS
    simple = query.device.type == "cpu" and not dropout and not special and query.dtype == key.dtype
    if not simple or attention_mask is None or attention_mask.dtype != torch.bool or attention_mask.shape[1] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if query.dtype == torch.float32:
        shared = query.shape[1] != key.shape[1]
        result = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=shared
        )
        return result.transpose(1, 2).contiguous(), None
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1:3]
    scale = width**-0.5 if scaling is None else scaling
    stacked = (query * scale).reshape(batch, groups, heads // groups * queries, width)
    scores = (stacked @ key.transpose(2, 3)).view(batch, heads, queries, keys)
    weights = scores.masked_fill(~attention_mask, float("-inf")).softmax(dim=-1)
    result = weights.view(batch, groups, heads // groups * queries, keys) @ value
    return result.view(batch, heads, queries, width).transpose(1, 2).contiguous(), None


def use_grouped_attention(decoder: PreTrainedModel) -> bool:
    """Lets a decoder that runs torch's attention use `grouped_attention`.

    Args:
        decoder: The decoder, changed in place; one that cannot exchange its attention stays as it is.

    Returns:
        Whether it does now.
    """
    text_config = decoder.config.get_text_config(decoder=True)
    if getattr(text_config, "_attn_implementation", None) != "sdpa" or not decoder._supports_attention_backend:
        return False
    AttentionInterface.register(GROUPED, grouped_attention)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)
    decoder.set_attn_implementation(GROUPED)
    return True
