"""The last decoder layer, computed only where it is read.

A prompt is read at one token, so of the last layer only that token's query, attention and MLP are ever looked at; of
all others only keys and values. In a decoder of four layers that saves most of a quarter of the work.

Shapes: Z tokens of the packed row, prefix included, C readings, H = hidden width, E columns of a head.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from llmgr_rec.kernels.packed_attention import PackedMask, packed_attention


class _ReadOut:
    """A decoder layer that answers with the readings alone where it is given `last_layer_mask`."""

    def forward(self, hidden_states: Tensor, last_layer_mask: PackedMask | None = None, **kwargs: Any) -> Tensor:
        if last_layer_mask is None:
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        return _read(self, hidden_states, kwargs["position_embeddings"], last_layer_mask)


class ReadOutLlamaLayer(_ReadOut, LlamaDecoderLayer):
    """The last layer of a LLaMA."""


class ReadOutMistralLayer(_ReadOut, MistralDecoderLayer):
    """The last layer of a Mistral, which computes as LLaMA's does."""


_KNOWN: dict[type[nn.Module], type[nn.Module]] = {
    LlamaDecoderLayer: ReadOutLlamaLayer,
    MistralDecoderLayer: ReadOutMistralLayer,
}


def compute_last_token_only(decoder: PreTrainedModel) -> bool:
    """Lets the last layer of a decoder be computed only where it is read; names and weights stay as they are.

    Args:
        decoder: The decoder, changed in place; one whose layers are not known stays as it is.

    Returns:
        Whether it can now.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or type(layers[-1]) not in _KNOWN:
        return False
    layers[-1].__class__ = _KNOWN[type(layers[-1])]
    return True


def _read(layer: Any, hidden_1ZH: Tensor, rotation: tuple[Tensor, Tensor], mask: PackedMask) -> Tensor:
    """The layer's result at the mask's querying tokens, [1, C, H]."""
    attention = layer.self_attn
    read_C = mask.query_tokens_Y + mask.prefix_length
    normed_1ZH = layer.input_layernorm(hidden_1ZH)
    query = _heads(attention.q_proj(normed_1ZH.index_select(1, read_C)), attention.head_dim)
    key, value = (
        _heads(projection(normed_1ZH), attention.head_dim) for projection in (attention.k_proj, attention.v_proj)
    )
    cos, sin = rotation
    query, _ = apply_rotary_pos_emb(query, query, cos.index_select(1, read_C), sin.index_select(1, read_C))
    key, _ = apply_rotary_pos_emb(key, key, cos, sin)
    attended = packed_attention(query, key, value, mask, attention.scaling)
    hidden_1CH = hidden_1ZH.index_select(1, read_C) + attention.o_proj(attended.flatten(2))
    return hidden_1CH + layer.mlp(layer.post_attention_layernorm(hidden_1CH))


def _heads(projected: Tensor, width: int) -> Tensor:
    return projected.unflatten(2, (-1, width)).transpose(1, 2)
