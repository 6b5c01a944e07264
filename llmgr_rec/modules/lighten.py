"""A trained language model made light for scoring: without LoRA products, optionally with fewer layers."""

from torch import nn

from llmgr_rec.modules.language_model import LoraLanguageModel
from llmgr_rec.modules.read_out import read_out_last_layer


def lighten(model: LoraLanguageModel, num_layers: int = 0) -> None:
    """Changes a language model for good; it reads the same but for rounding, unless layers are dropped.

    Args:
        model: The trained model; it cannot be trained or exported afterwards.
        num_layers: First layers kept, read through the final norm; 0 keeps all.

    Raises:
        ValueError: The decoder has fewer layers, or its layers cannot be told.
    """
    # Merged in the float32 of the LoRA weights, so a bfloat16 weight is rounded once.
    model.decoder.merge_and_unload()
    if num_layers:
        layers = getattr(model.base, "layers", None)
        if not isinstance(layers, nn.ModuleList) or num_layers > len(layers):
            raise ValueError(f"the first {num_layers} layers cannot be kept")
        del layers[num_layers:]
        model.base.config.get_text_config(decoder=True).num_hidden_layers = num_layers
        read_out_last_layer(model.base)
