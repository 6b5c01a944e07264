"""The last decoder layer, computed only where it is read.

A prompt is read at one token, so of the last layer only that token's query, attention and MLP are ever looked at; of
all others only keys and values. In a decoder of four layers that saves most of a quarter of the work.

Shapes: Z tokens of the packed row, prefix included, C readings, H = hidden width, E columns of a head.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from llmgr_rec.modules.packed_attention import View, packed_attention

# Layers whose computation is known to be the one below.
_KNOWN = (LlamaDecoderLayer, MistralDecoderLayer)


def can_read_out(decoder: PreTrainedModel) -> bool:
    """Whether the decoder's last layer can be computed in part."""
    layers = getattr(decoder, "layers", None)
    return isinstance(layers, nn.ModuleList) and type(layers[-1]) in _KNOWN


def read_out_last_layer(decoder: PreTrainedModel) -> None:
    """Makes the last layer of a decoder answer with the readings alone where it is given `read_view`.

    Args:
        decoder: One for which `can_read_out` holds; changed in place, names and weights stay as they are.
    """
    layer = decoder.layers[-1]
    layer.forward = partial(_forward, layer, layer.forward)


def _forward(layer: Any, whole: Any, hidden_states: Tensor, read_view: View | None = None, **kwargs: Any) -> Tensor:
    if read_view is None:
        return whole(hidden_states, **kwargs)
    return _read(layer, hidden_states, kwargs["position_embeddings"], read_view)


def _read(layer: Any, hidden_1ZH: Tensor, rotation: tuple[Tensor, Tensor], view: View) -> Tensor:
    """The layer's result at the view's tokens, [1, C, H]."""
    attention = layer.self_attn
    read_C = view.tokens_Y + view.prefix
    normed_1ZH = layer.input_layernorm(hidden_1ZH)
    query = _heads(attention.q_proj(normed_1ZH.index_select(1, read_C)), attention.head_dim)
    key, value = (
        _heads(projection(normed_1ZH), attention.head_dim) for projection in (attention.k_proj, attention.v_proj)
    )
    cos, sin = rotation
    query, _ = apply_rotary_pos_emb(query, query, cos.index_select(1, read_C), sin.index_select(1, read_C))
    key, _ = apply_rotary_pos_emb(key, key, cos, sin)
    attended = packed_attention(query, key, value, view, attention.scaling)
    hidden_1CH = hidden_1ZH.index_select(1, read_C) + attention.o_proj(attended.flatten(2))
    return hidden_1CH + layer.mlp(layer.post_attention_layernorm(hidden_1CH))


def _heads(projected: Tensor, width: int) -> Tensor:
    return projected.unflatten(2, (-1, width)).transpose(1, 2)
