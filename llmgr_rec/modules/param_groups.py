"""Parameter groups: which part of the model a parameter belongs to, and switching parts on and off."""

from collections.abc import Collection
from typing import Literal

from torch import nn

ParamGroup = Literal["tables", "encoder", "text_encoder", "adapter", "lora", "head"]


_GROUP_OF_PART: dict[str, ParamGroup] = {
    "item_tables": "tables",
    "encoder": "encoder",
    "text_encoder": "text_encoder",
    "adapter": "adapter",
    "head": "head",
}


def param_group(parameter_name: str) -> ParamGroup | None:
    """Names the group of a parameter.

    Wrappers (a task, DistributedDataParallel, DistributedModelParallel) may stand before the part's own name.

    Args:
        parameter_name: Qualified name, such as `llmgr.recommender.encoder.graph_network.message.weight`.

    Returns:
        The group; None for what is never trained (the base language model, text encodings) and for foreign parameters.
    """
    parts = parameter_name.split(".")
    for part in parts:
        if part in _GROUP_OF_PART:
            return _GROUP_OF_PART[part]
        if part == "text_tables":
            return None
        if part == "language_model":
            return "lora" if any(name.startswith("lora_") for name in parts) else None
    return None


def select_trainable(module: nn.Module, groups: Collection[ParamGroup]) -> list[str]:
    """Lets the parameters of some groups train and freezes all others.

    Sharded tables ignore `requires_grad`: they also need an optimizer of learning rate 0, see the sharding code.

    Args:
        module: The model; its parameters' `requires_grad` is set.
        groups: Groups to train.

    Returns:
        Names of the parameters that train, in the module's order.
    """
    names = []
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(param_group(name) in groups)
        if parameter.requires_grad:
            names.append(name)
    return names
