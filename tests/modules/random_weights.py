"""Random weights, with which every part of a model changes its scores. Fresh LoRA layers have output 0."""

from typing import TypeVar

import torch
from torch import nn

from llmgr_rec.storage.table_io import init_tables

Model = TypeVar("Model", bound=nn.Module)


def randomize_weights(model: Model) -> Model:
    """Randomizes tables and dense weights, and puts the model into evaluation mode."""
    init_tables(model, 1, 0.5)
    randomize_dense_weights(model)
    return model.eval()


@torch.no_grad()
def randomize_dense_weights(model: nn.Module) -> None:
    """Adds noise to every dense weight, LoRA included, except the language model's own."""
    generator = torch.Generator().manual_seed(8)
    for name, parameter in model.named_parameters():
        if "embedding_bags" not in name and ("language_model" not in name or "lora_" in name):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
