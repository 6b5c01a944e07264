"""Which values settings may have, beyond their types."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from llmgr_rec.config import STAGES, Config, PriorConfig, neighbour_clicks, reader_weights
from llmgr_rec.errors import UserError

# Seeds go to torch and numpy, which take different ranges; this one both take.
_LARGEST_SEED = 2**63 - 1

_AT_LEAST: dict[str, float] = {
    "seed": 0,
    "tables.dim": 4,
    "encoder.steps": 1,
    "text.dim": 1,
    "text.clicks": 1,
    "text.drawn_items": 1,
    "text.score_weight": 0,
    "tables.neighbour_clicks": 0,
    "encoder.attention_layers": 0,
    "encoder.attention_heads": 1,
    "encoder.max_clicks": 1,
    "llm.num_layers": 0,
    "llm.lora_rank": 1,
    "prompt.max_nodes": 0,
    "prompt.text_items": 0,
    "prompt.max_text_tokens": 1,
    "align.contrastive_weight": 0,
    "align.hard_negatives": 0,
    "prior.kept": 1,
    "prior.weights": 0,
    "loss.full_softmax_max_items": 0,
    "loss.sampled_items": 1,
    "runtime.threads_per_rank": 0,
    "runtime.reader_workers": 0,
    "runtime.eval_batch_size": 1,
    "runtime.checkpoint_every": 0,
    "runtime.keep_checkpoints": 1,
    "runtime.log_every": 1,
    "runtime.timeout_s": 1,
}
_AT_LEAST_IN_STAGES: dict[str, float] = {
    "epochs": 0,
    "max_steps": 0,
    "batch_size": 1,
    "weight_decay": 0,
    "eval_every": 0,
    "patience": 0,
}
_ABOVE_0 = {
    "tables.lr",
    "tables.init_std",
    "tables.memory_per_rank_gb",
    "encoder.temperature",
    "llm.lora_alpha",
    "align.contrastive_temperature",
}
_ABOVE_0_IN_STAGES = ("lr", "clip_norm")
_SHARES = {"encoder.last_item_weight"}
_SHARES_IN_STAGES = ("warmup",)
# A share of 1 would leave nothing.
_DROPOUTS = {"encoder.dropout", "text.dropout", "llm.lora_dropout"}

# Parameter groups that the loss of a stage reaches.
_TRAINS_IN_STAGE = {
    "sbr": ("tables", "encoder"),
    "text": ("text_encoder",),
    "align": ("tables", "encoder", "adapter", "lora", "head"),
    "behave": ("tables", "encoder", "adapter", "lora", "head"),
}

for _stage in STAGES:
    _AT_LEAST |= {f"{_stage}.{name}": bound for name, bound in _AT_LEAST_IN_STAGES.items()}
    _ABOVE_0 |= {f"{_stage}.{name}" for name in _ABOVE_0_IN_STAGES}
    _SHARES |= {f"{_stage}.{name}" for name in _SHARES_IN_STAGES}


def check_limits(config: Config) -> None:
    """Refuses settings out of range.

    Raises:
        UserError: A setting has a value that it cannot have; names setting, value and range.
    """
    for name, value in _numbers(asdict(config)):
        if remedy := _complaint(name, value):
            raise UserError(f"setting {name} is {value}; {remedy}")
    if config.tables.dim % 4:
        raise UserError(f"setting tables.dim is {config.tables.dim}; give a multiple of 4, as tables need")
    if not neighbour_clicks(config):
        raise UserError("setting tables.neighbour_clicks names no number; give at least one, such as 0")
    _check_head(config)
    _check_reader(config)
    _check_one_pass(config)
    _check_prior(config.prior)
    if not config.prompt.text_fields:
        raise UserError("setting prompt.text_fields is empty; name at least one text column, such as title")
    _check_trainable(config)


def _check_trainable(config: Config) -> None:
    for stage in STAGES:
        settings = getattr(config, stage)
        if not settings.epochs:
            continue
        known = _TRAINS_IN_STAGE[stage]
        if not settings.trainable:
            raise UserError(f"setting {stage}.trainable is empty; name the parameter groups that the stage trains")
        if foreign := [group for group in settings.trainable if group not in known]:
            raise UserError(
                f"setting {stage}.trainable names {foreign[0]}, which stage {stage} does not train; "
                f"name what it is to train of {', '.join(known)}"
            )


def _check_head(config: Config) -> None:
    head = config.head
    if head.apart and not head.residual:
        raise UserError(
            "setting head.apart is true, but without the session recommender's score there is nothing to train the "
            "head apart from; set head.residual to true, or head.apart to false"
        )


def _check_reader(config: Config) -> None:
    """A language model that reads sessions ends the run: its bundle holds the weights, and no stage goes on from it."""
    if not config.text.epochs:
        return
    if config.text.dim % 4:
        raise UserError(
            f"setting text.dim is {config.text.dim}; give a multiple of 4, as the table of a reader's vectors needs"
        )
    if not reader_weights(config):
        raise UserError("setting text.score_weight names no number; give at least one, such as 1")
    if later := [stage for stage in ("align", "behave") if getattr(config, stage).epochs]:
        raise UserError(
            f"setting text.epochs is {config.text.epochs}, but stage {later[0]} does not go on from stage text; "
            f"set {later[0]}.epochs to 0, or text.epochs to 0"
        )


def _check_one_pass(config: Config) -> None:
    """Readings of one pass share what stands at {nodes}, which therefore must not know later clicks."""
    if not config.behave.one_pass:
        return
    if config.prompt.node_source == "encoder":
        raise UserError(
            "setting behave.one_pass is true, but prompt.node_source is encoder, whose node states know later clicks; "
            "set prompt.node_source to table"
        )
    if config.prompt.node_order == "unique":
        raise UserError(
            "setting behave.one_pass is true, but prompt.node_order is unique, which depends on later clicks; "
            "set prompt.node_order to clicks"
        )


def _check_prior(prior: PriorConfig) -> None:
    names = ", ".join(prior.neighbours) or "nothing"
    if len(set(prior.neighbours)) < len(prior.neighbours):
        raise UserError(f"setting prior.neighbours names {names}; name each neighbour once")
    if prior.weights and len(prior.weights) != len(prior.neighbours):
        raise UserError(
            f"setting prior.weights has {len(prior.weights)} numbers, but prior.neighbours names {names}; give one "
            "weight for each, or none to have them chosen on the validation sessions"
        )


def _complaint(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "give a finite number"
    if name in _ABOVE_0 and value <= 0:
        return "give a number above 0"
    if name in _SHARES and not 0 <= value <= 1:
        return "give a share from 0 to 1"
    if name in _DROPOUTS and not 0 <= value < 1:
        return "give a probability from 0 to below 1"
    if name in _AT_LEAST and value < _AT_LEAST[name]:
        return f"give {_AT_LEAST[name]} or more"
    if name == "seed" and value > _LARGEST_SEED:
        return f"give at most {_LARGEST_SEED}"
    return ""


def _numbers(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
            continue
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int | float) and not isinstance(one, bool):
                yield prefix + name, one
