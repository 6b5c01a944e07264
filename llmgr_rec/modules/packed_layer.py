"""LLaMA's decoder layers on packed prompts, in few operators; the last layer computes only the output tokens.

The output of a prompt is the hidden state of its last token. In the last layer the other tokens only need keys and
values: no query, attention output or MLP. In a decoder of four layers that saves nearly a quarter of the computation.

Parameters and results are those of the layers of transformers with PEFT's LoRA, but for rounding: `LoraLanguageModel`
with `packs_prompts` False is the reference.

Shapes: Z tokens of the packed row, prefix included, C output tokens, Y either, H = hidden width, E columns of a head.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from llmgr_rec.kernels.lora_products import LoraProduct, lora_products
from llmgr_rec.kernels.packed_attention import PackedMask, packed_attention
from llmgr_rec.kernels.rms_norm import rms_norm
from llmgr_rec.kernels.rotary import rotate


class _PackedLayer:
    """Mixin of a decoder layer that encodes a packed row if it is called with `packed_mask`.

    Attributes:
        outputs_only: Whether it computes only the output tokens, as the last layer does.
    """

    outputs_only = False

    def forward(
        self,
        hidden_states: Tensor,
        packed_mask: PackedMask | None = None,
        last_layer_mask: PackedMask | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if packed_mask is None or last_layer_mask is None:
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        cos_ZE, sin_ZE = (part.squeeze(0) for part in kwargs["position_embeddings"])
        # All dtypes are those of the weights, without a check at each operator. The gradient of squeeze copies nothing.
        with torch.autocast(hidden_states.device.type, enabled=False):
            if self.outputs_only:
                return _forward(self, hidden_states.squeeze(0), cos_ZE, sin_ZE, last_layer_mask, True).unsqueeze(0)
            return _forward(self, hidden_states.squeeze(0), cos_ZE, sin_ZE, packed_mask, False).unsqueeze(0)


class PackedLlamaLayer(_PackedLayer, LlamaDecoderLayer):
    """A layer of a LLaMA decoder."""


class PackedMistralLayer(_PackedLayer, MistralDecoderLayer):
    """A layer of a Mistral decoder, which has the structure of LLaMA's."""


_PACKED_CLASS: dict[type[nn.Module], type[_PackedLayer]] = {
    LlamaDecoderLayer: PackedLlamaLayer,
    MistralDecoderLayer: PackedMistralLayer,
}


def use_packed_layers(decoder: PreTrainedModel) -> bool:
    """Replaces the classes of a decoder's layers by those that can encode packed rows; the last computes outputs only.

    Parameter names and values do not change.

    Args:
        decoder: The decoder, modified in place; unchanged if the type of its layers is not supported.

    Returns:
        Whether the type of its layers is supported.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return False
    if not all(isinstance(layer, (_PackedLayer, *_PACKED_CLASS)) for layer in layers):
        return False
    for layer in layers:
        if type(layer) in _PACKED_CLASS:
            layer.__class__ = _PACKED_CLASS[type(layer)]  # type: ignore[assignment]
    layers[-1].outputs_only = True  # type: ignore[assignment]
    return True


def _forward(
    layer: Any, hidden_ZH: Tensor, cos_ZE: Tensor, sin_ZE: Tensor, mask: PackedMask, outputs_only: bool
) -> Tensor:
    """Output of the layer at all tokens, [Z, H], or at the query tokens of the mask, [C, H]."""
    attention = layer.self_attn
    normed_ZH = _norm(layer.input_layernorm, hidden_ZH)
    if outputs_only:
        # Rows of padding repeat the first output.
        output_C = functional.pad(mask.query_tokens_Y, (0, mask.query_padding)) + mask.prefix_length
        hidden_YH = hidden_ZH.index_select(0, output_C)
        (query,) = _products(normed_ZH.index_select(0, output_C), attention.q_proj)
        key, value = _products(normed_ZH, attention.k_proj, attention.v_proj)
        query_cos, query_sin = cos_ZE.index_select(0, output_C), sin_ZE.index_select(0, output_C)
    else:
        hidden_YH, query_cos, query_sin = hidden_ZH, cos_ZE, sin_ZE
        query, key, value = _products(normed_ZH, attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (projected.unflatten(1, (-1, attention.head_dim)) for projected in (query, key, value))
    query, key = rotate(query, query_cos, query_sin), rotate(key, cos_ZE, sin_ZE)
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    attended = packed_attention(query, key, value, mask, float(attention.scaling))
    hidden_YH = hidden_YH + _products(attended.flatten(2).squeeze(0), attention.o_proj)[0]
    mlp = layer.mlp
    gate, up = _products(_norm(layer.post_attention_layernorm, hidden_YH), mlp.gate_proj, mlp.up_proj)
    return hidden_YH + _products(mlp.act_fn(gate) * up, mlp.down_proj)[0]


def _norm(norm: Any, hidden_YH: Tensor) -> Tensor:
    return rms_norm(hidden_YH, norm.weight.to(hidden_YH.dtype), norm.variance_epsilon)


def _products(inputs: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Products of one input with linear layers, with or without LoRA; all of them share the LoRA input's dropout."""
    if not any(isinstance(layer, LoraLinear) and not layer.disable_adapters and not layer.merged for layer in layers):
        bases = (layer.get_base_layer() if isinstance(layer, LoraLinear) else layer for layer in layers)
        return tuple(functional.linear(inputs, base.weight, base.bias) for base in bases)  # type: ignore[arg-type]
    first: Any = layers[0]
    dropped = first.lora_dropout[first.active_adapters[0]](inputs)
    return lora_products(inputs, None if dropped is inputs else dropped, [_product(layer) for layer in layers])


def _product(layer: Any) -> LoraProduct:
    base, (adapter,) = layer.get_base_layer(), layer.active_adapters
    a_RI, b_OR = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return LoraProduct(base.weight, base.bias, a_RI, b_OR, layer.scaling[adapter])
