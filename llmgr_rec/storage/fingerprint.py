"""Config fingerprint: the settings that decide what a stage computes. Checkpoints and shared trainings are told apart by it.

What a setting invalidates stands with its field in `llmgr_rec.config`.
"""

import hashlib
import json
from typing import Any

import torch

from llmgr_rec.config import Config, StageName, settings
from llmgr_rec.data.prompt_templates import load_templates
from llmgr_rec.storage.pretrained import resolve_dtype


def fingerprint(stage: StageName, config: Config, device: torch.device) -> dict[str, Any]:
    """Settings that decide what a stage makes of the weights it starts from.

    Args:
        stage: Stage.
        config: All settings.
        device: Device of the model, which decides what `auto` stands for in a number format.

    Returns:
        Dotted name to value. A number format stands as what `auto` resolves to, a template file as a hash of its text.
    """
    found = {
        one.name: one.value
        for one in settings(config)
        if stage in one.info.stages and one.info.invalidates in ("checkpoint", "stages")
    }
    for name in {"loss.dtype", "llm.dtype"} & found.keys():
        found[name] = str(resolve_dtype(found[name], device)).removeprefix("torch.")
    if "prompt.templates" in found:
        found["prompt.templates"] = _hash_of_templates(config.prompt.templates)
    return found


def inherited_settings(earlier: StageName, config: Config) -> dict[str, Any]:
    """Settings in which a stage must equal the stage that it goes on from.

    Args:
        earlier: The stage that it goes on from.
        config: All settings of either stage.

    Returns:
        Dotted name to value.
    """
    return {
        one.name: one.value
        for one in settings(config)
        if earlier in one.info.stages and one.info.invalidates == "stages"
    }


def _hash_of_templates(templates: str) -> str:
    texts = {task: template.text for task, template in load_templates(templates).items()}
    return f"templates {hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]}"
