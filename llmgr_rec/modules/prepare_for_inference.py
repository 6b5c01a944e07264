"""Preparation of trained models for inference: merging LoRA, dropping layers, folding weights."""

from typing import TYPE_CHECKING

from torch import nn

from llmgr_rec.modules.gated_graph import GatedGraph

if TYPE_CHECKING:
    from llmgr_rec.modules.language_model import LoraLanguageModel


def prepare_for_inference(model: "LoraLanguageModel", num_layers: int = 0) -> None:
    """Merges LoRA into the weights, and optionally drops the last layers.

    Unless layers are dropped, hidden states change only by rounding. The model cannot be trained or exported after it.

    Args:
        model: The trained model, modified in place.
        num_layers: Number of first layers to keep, followed by the final norm; 0 keeps all.

    Raises:
        ValueError: The decoder has fewer layers, or no attribute `layers`.
    """
    # Merged in the float32 of the LoRA weights, a bfloat16 weight is rounded once, see `kernels.fused_lora`.
    model.decoder.merge_and_unload()
    if num_layers:
        layers = getattr(model.base, "layers", None)
        if not isinstance(layers, nn.ModuleList) or num_layers > len(layers):
            raise ValueError(f"the decoder does not have {num_layers} layers to keep")
        del layers[num_layers:]
        model.base.config.get_text_config(decoder=True).num_hidden_layers = num_layers
        from llmgr_rec.modules.packed_layer import use_packed_layers

        use_packed_layers(model.base)


def fold_weights(model: nn.Module) -> None:
    """Computes products of weights for good that a session encoder would compute in each call.

    Args:
        model: The trained model, which must not be trained any more, modified in place.
    """
    for module in model.modules():
        if isinstance(module, GatedGraph):
            module.fold()
