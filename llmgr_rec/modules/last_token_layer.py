"""The last decoder layer, computed at the output tokens only.

The output of a prompt is the hidden state of its last token. In the last layer the other tokens only need keys and
values: no query, attention output or MLP. In a decoder of four layers that saves nearly a quarter of the computation.

Shapes: Z tokens of the packed row, prefix included, C outputs, H = hidden width, E columns of an attention head.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from llmgr_rec.kernels.packed_attention import PackedMask, packed_attention


class _LastTokenLayer:
    """Mixin of a decoder layer that computes only the output tokens if it is called with `last_layer_mask`."""

    def forward(self, hidden_states: Tensor, last_layer_mask: PackedMask | None = None, **kwargs: Any) -> Tensor:
        if last_layer_mask is None:
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        return _forward_outputs(self, hidden_states, kwargs["position_embeddings"], last_layer_mask)


class LastTokenLlamaLayer(_LastTokenLayer, LlamaDecoderLayer):
    """The last layer of a LLaMA decoder."""


class LastTokenMistralLayer(_LastTokenLayer, MistralDecoderLayer):
    """The last layer of a Mistral decoder, which has the structure of LLaMA's."""


_LAST_TOKEN_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    LlamaDecoderLayer: LastTokenLlamaLayer,
    MistralDecoderLayer: LastTokenMistralLayer,
}


def compute_last_token_only(decoder: PreTrainedModel) -> bool:
    """Replaces the class of a decoder's last layer by one that can compute the output tokens only.

    Parameter names and values do not change.

    Args:
        decoder: The decoder, modified in place; unchanged if the type of its layers is not supported.

    Returns:
        Whether the type of its layers is supported.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or type(layers[-1]) not in _LAST_TOKEN_CLASS:
        return False
    layers[-1].__class__ = _LAST_TOKEN_CLASS[type(layers[-1])]
    return True


def _forward_outputs(layer: Any, hidden_1ZH: Tensor, rotation: tuple[Tensor, Tensor], mask: PackedMask) -> Tensor:
    """Output of the layer at the query tokens of the mask, [1, C, H]."""
    attention = layer.self_attn
    output_C = mask.query_tokens_Y + mask.prefix_length
    normed_1ZH = layer.input_layernorm(hidden_1ZH)
    query = _heads(attention.q_proj(normed_1ZH.index_select(1, output_C)), attention.head_dim)
    key, value = (
        _heads(projection(normed_1ZH), attention.head_dim) for projection in (attention.k_proj, attention.v_proj)
    )
    cos, sin = rotation
    query, _ = apply_rotary_pos_emb(query, query, cos.index_select(1, output_C), sin.index_select(1, output_C))
    key, _ = apply_rotary_pos_emb(key, key, cos, sin)
    attended = packed_attention(query, key, value, mask, attention.scaling)
    hidden_1CH = hidden_1ZH.index_select(1, output_C) + attention.o_proj(attended.flatten(2))
    return hidden_1CH + layer.mlp(layer.post_attention_layernorm(hidden_1CH))


def _heads(projected: Tensor, width: int) -> Tensor:
    return projected.unflatten(2, (-1, width)).transpose(1, 2)
