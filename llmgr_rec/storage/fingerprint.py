"""Config fingerprint: the settings that determine the weights of a stage.

Checkpoints and shared trainings with different fingerprints are not interchangeable. The metadata of each field in
`llmgr_rec.config` states what a setting invalidates.
"""

import hashlib
import json
from typing import Any

import torch

from llmgr_rec.config import Config, StageName, settings
from llmgr_rec.data.prompt_templates import load_templates
from llmgr_rec.storage.number_format import resolve_dtype

# Values of settings before they were there, where those are not their defaults.
_BEFORE = {"optimizer.average": 0.0}


def fingerprint(stage: StageName, config: Config, device: torch.device) -> dict[str, Any]:
    """Settings that determine the weights of a stage, given the weights it starts from.

    Args:
        stage: Stage.
        config: All settings.
        device: Device of the model, which determines the number format of `auto`.

    Returns:
        Value of each setting by dotted name. The number format `auto` is resolved, and the path of prompt templates is
        replaced by a hash of their text.
    """
    values = {
        setting.name: setting.value
        for setting in settings(config)
        if stage in setting.info.stages and setting.info.invalidates in ("checkpoint", "stages")
    }
    for name in {"loss.dtype", "llm.dtype"} & values.keys():
        values[name] = str(resolve_dtype(values[name], device)).removeprefix("torch.")
    if "prompt.templates" in values:
        values["prompt.templates"] = _hash_of_templates(config.prompt.templates)
    return values


def values_before_settings() -> dict[str, Any]:
    """What versions that did not have a setting did: its default mostly; by dotted name, as JSON has it."""
    defaults = {setting.name: json.loads(json.dumps(setting.value)) for setting in settings(Config())}
    return defaults | _BEFORE


def inherited_settings(earlier: StageName, config: Config) -> dict[str, Any]:
    """Settings that must be equal in a stage and in the stage that it starts from.

    Args:
        earlier: Stage that it starts from.
        config: All settings of either stage.

    Returns:
        Value of each setting by dotted name.
    """
    return {
        setting.name: setting.value
        for setting in settings(config)
        if earlier in setting.info.stages and setting.info.invalidates == "stages"
    }


def _hash_of_templates(templates: str) -> str:
    texts = {task: template.text for task, template in load_templates(templates).items()}
    return f"templates {hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]}"
