"""Prepares a trained language model for inference: LoRA is merged into the weights, layers may be dropped."""

from torch import nn

from llmgr_rec.modules.language_model import LoraLanguageModel
from llmgr_rec.modules.last_token_layer import compute_last_token_only


def prepare_for_inference(model: LoraLanguageModel, num_layers: int = 0) -> None:
    """Merges LoRA into the weights, and optionally drops the last layers.

    The change is permanent. The hidden states stay the same but for rounding, unless layers are dropped.

    Args:
        model: The trained model; it cannot be trained or exported afterwards.
        num_layers: First layers kept; the final norm follows them. 0 keeps all.

    Raises:
        ValueError: The decoder has fewer layers, or its layers are not found.
    """
    # Merged in the float32 of the LoRA weights, so a bfloat16 weight is rounded once.
    model.decoder.merge_and_unload()
    if num_layers:
        layers = getattr(model.base, "layers", None)
        if not isinstance(layers, nn.ModuleList) or num_layers > len(layers):
            raise ValueError(f"the first {num_layers} layers cannot be kept")
        del layers[num_layers:]
        model.base.config.get_text_config(decoder=True).num_hidden_layers = num_layers
        compute_last_token_only(model.base)
