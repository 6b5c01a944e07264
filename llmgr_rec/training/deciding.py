"""What settings decide, in one place: runs are resumed, stages go on from others and studies share trainings by it.

Only exceptions are listed, so that a setting which nobody thought of counts as deciding: the safe side.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

import torch

from llmgr_rec.config import Config, StageName
from llmgr_rec.data.pretrained import resolve_dtype
from llmgr_rec.data.prompt_files import load_templates
from llmgr_rec.stage_config import RECOMMENDER_STAGES

# Decide how the machine is used, or are chosen when a stage has been trained: no weight that it trains depends on them.
_FREE = frozenset(
    {
        "tables.sharding",
        "tables.memory_per_rank_gb",
        "tables.neighbour_clicks",
        "text.score_weight",
        "llm.recompute",
        "llm.shard",
    }
)
# Decide how weights are learned, and not their shape or meaning: a stage may differ in them from the one before it.
_LEARNING = frozenset(
    {
        "tables.optimizer",
        "tables.lr",
        "tables.init_std",
        "encoder.dropout",
        # A language model is told apart by its weights, and not by its name.
        "llm.name_or_path",
        "llm.dtype",
        "llm.lora_dropout",
        "prompt.templates",
        "prompt.node_order",
        "prompt.max_nodes",
        "prompt.text_items",
        "prompt.max_text_tokens",
        "prompt.text_fields",
    }
)
_RECOMMENDER_PARTS = ("tables", "encoder")
_LANGUAGE_PARTS = ("llm", "prompt", "head", "controls")


def deciding_settings(stage: StageName, config: Config, device: torch.device) -> dict[str, Any]:
    """The settings that decide what a stage makes of the weights that it goes on from.

    Args:
        stage: Stage.
        config: All settings.
        device: Where it computes, which decides what `auto` is for a number format.

    Returns:
        Dotted name to value; a number format as what `auto` stands for, a prompt file as what it says.
    """
    names = {"seed", *_names_in(config, *_RECOMMENDER_PARTS, "loss", stage)}
    if stage not in RECOMMENDER_STAGES:
        names |= {*_names_in(config, *_LANGUAGE_PARTS)}
        names.remove("loss.dtype")
    else:
        names.add("controls.shuffled_words")
    if stage == "text":
        names |= {*_text_settings(config), "llm.dtype"}
    found = {name: setting(config, name) for name in sorted(names - _FREE)}
    for name in {"loss.dtype", "llm.dtype"} & found.keys():
        found[name] = str(resolve_dtype(found[name], device)).removeprefix("torch.")
    if "prompt.templates" in found:
        found["prompt.templates"] = _wording(config.prompt.templates)
    return found


def settings_taken_over(stage: str, config: Config) -> list[str]:
    """Names of the settings in which a later stage must not differ from the one that it goes on from.

    Args:
        stage: The stage that it goes on from.
        config: All settings of the later one.
    """
    names = {*_names_in(config, *_RECOMMENDER_PARTS), "controls.shuffled_words"}
    if stage not in RECOMMENDER_STAGES:
        names |= {*_names_in(config, *_LANGUAGE_PARTS)}
    names -= _FREE | _LEARNING
    if config.controls.shuffled_words:
        names.add("seed")
    if stage not in RECOMMENDER_STAGES:
        names |= {*_drawn_by_seed(config)}
    return sorted(names)


def _text_settings(config: Config) -> tuple[str, ...]:
    """Names of the settings that decide which language model reads sessions, and what texts it reads."""
    controls = ("controls.random_llm", "controls.shuffled_text", *_drawn_by_seed(config))
    return ("llm.name_or_path", "llm.num_layers", "prompt.text_fields", "prompt.max_text_tokens", *controls)


def setting(config: Config, name: str) -> Any:
    """The value of a setting by its dotted name."""
    value: Any = asdict(config)
    for part in name.split("."):
        value = value[part]
    return value


def _drawn_by_seed(config: Config) -> tuple[str, ...]:
    """The seed, where weights of the language model or the order of texts are drawn."""
    return ("seed",) if config.controls.random_llm or config.controls.shuffled_text else ()


def _names_in(config: Config, *parts: str) -> Iterator[str]:
    for part in parts:
        yield from (f"{part}.{field.name}" for field in fields(getattr(config, part)))


def _wording(templates: str) -> str:
    texts = {task: template.text for task, template in load_templates(templates).items()}
    return f"a file of wording {hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]}"
