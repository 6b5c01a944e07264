"""Reads and writes LoRA weights as an adapter that peft loads, onto the decoder and onto the model around it.

peft finds weights by the names of their modules. In the class with an output head (such as `LlamaForCausalLM`) the
decoder is a submodule, so its modules have longer names there. Each weight is therefore written under both names; peft
ignores the names that a model does not have.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file
from torch import Tensor

from llmgr_rec.distributed.fsdp import shard_like
from llmgr_rec.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_WEIGHTS, _SETTINGS = "adapter_model.safetensors", "adapter_config.json"
# What peft puts before the name of a module of the model that it was given.
_PREFIX = "base_model.model."


def save_adapter(decoder: "PeftModel", weights: dict[str, Tensor], folder: Path, base: str) -> None:
    """Writes LoRA weights.

    Args:
        decoder: The decoder with its LoRA layers.
        weights: Full LoRA weights, by name in the decoder.
        folder: Folder to create.
        base: Folder or hub id from which transformers loads the base model.
    """
    decoder.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False, state_dict=weights)
    (folder / "README.md").unlink(missing_ok=True)
    stored = load_file(folder / ADAPTER_WEIGHTS)
    both = {name: value for key, value in stored.items() for name in (key, _outer_name(decoder, key))}
    # safetensors does not accept two names for the same memory.
    save_file(
        {name: value.clone() for name, value in both.items()}, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"}
    )
    settings = json.loads((folder / _SETTINGS).read_text())
    # PEFT writes the local path of the base model, or none.
    settings["base_model_name_or_path"] = base
    # PEFT shortens the names to a set of endings, which also match layers of the base model that were not trained.
    settings["target_modules"] = sorted({key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in stored})
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True))


def load_adapter(decoder: "PeftModel", folder: Path) -> list[str]:
    """Copies LoRA weights into a decoder; each rank takes its shards.

    Args:
        decoder: The decoder with its LoRA layers, sharded or not.
        folder: Folder of the adapter; version 0.2.0 and earlier wrote each weight under one name.

    Returns:
        Names of the LoRA weights that are not in the folder.

    Raises:
        UserError: The folder has weights for a layer without LoRA.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    if not (folder / ADAPTER_WEIGHTS).is_file():
        return [name for name, _ in decoder.named_parameters() if "lora_" in name]
    targets = get_peft_model_state_dict(decoder, save_embedding_layers=False)
    stored = load_file(folder / ADAPTER_WEIGHTS)
    if unknown := stored.keys() - targets.keys() - {_outer_name(decoder, name) for name in targets}:
        raise UserError(
            f"{folder} has LoRA weights for {min(unknown)}, which the model lacks; "
            "use the settings of the run that made it"
        )
    weights = {name: shard_like(stored[name], value) for name, value in targets.items() if name in stored}
    result = set_peft_model_state_dict(decoder, weights)
    return [name for name in result.missing_keys if "lora_" in name]


def _outer_name(decoder: "PeftModel", name: str) -> str:
    """Name of a weight in the class with an output head, of which the decoder is a submodule."""
    inner = decoder.base_model.model.base_model_prefix
    return name.replace(_PREFIX, f"{_PREFIX}{inner}." if inner else _PREFIX, 1)
