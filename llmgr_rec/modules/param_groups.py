"""Parameter groups: the part of the model that a parameter belongs to, and freezing of parts."""

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
    """The group of a parameter.

    The name may have prefixes of wrappers (a task, DistributedDataParallel, DistributedModelParallel).

    Args:
        parameter_name: Qualified name, such as `llmgr.recommender.encoder.graph_network.message.weight`.

    Returns:
        The group; None for parameters that never train (base language model, text embeddings) and unknown ones.
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
    """Sets `requires_grad` of the parameters of the given groups, and clears it for all others.

    TorchRec's fused optimizers ignore `requires_grad`. To freeze sharded tables, they also need learning rate 0; see
    `llmgr_rec.distributed.sharding`.

    Args:
        module: The model, modified in place.
        groups: Groups to train.

    Returns:
        Names of the trainable parameters, in the order of `named_parameters`.
    """
    names = []
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(param_group(name) in groups)
        if parameter.requires_grad:
            names.append(name)
    return names
