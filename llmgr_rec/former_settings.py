"""Settings of former versions: what is called otherwise now, and what is fixed now. Files and checkpoints have them."""

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from llmgr_rec.errors import UserError

# Present name of each setting that had another one.
RENAMED = {"blend.text_encoder": "blend.embedding_model"}
# What is done now in place of each setting that was removed.
FIXED: dict[str, Any] = {"encoder.last_item_weight": 0.6, "contrast.temperature": 0.07, "contrast.hard_negatives": 0}

_log = logging.getLogger(__name__)


def translated(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file in the names of this version.

    Args:
        content: Settings by group and name, as in a YAML file; it may have any content.

    Raises:
        UserError: A setting that is fixed now has another value, or one is given by both of its names.
    """
    result = deepcopy(dict(content))
    for former in (*RENAMED, *FIXED):
        group, name = former.split(".")
        if not isinstance(result.get(group), dict) or name not in result[group]:
            continue
        value = result[group].pop(name)
        if former in RENAMED:
            _, present = RENAMED[former].split(".")
            if present in result[group]:
                raise UserError(f"settings {former} and {RENAMED[former]} are the same; give the latter only")
            result[group][present] = value
        elif value != FIXED[former]:
            raise UserError(f"setting {former} is {value!r}, but is {FIXED[former]} in this version; delete it")
    return result


def of_this_version(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint, by dotted name, without those that have the value that is fixed now.

    Args:
        settings: Value of each setting.
    """
    return {name: value for name, value in settings.items() if name not in FIXED or value != FIXED[name]}


def present_options(argv: Sequence[str]) -> list[str]:
    """Arguments of a command with the present names of settings; logs those that are replaced.

    Args:
        argv: Arguments.

    Raises:
        UserError: A setting is fixed now.
    """
    words = []
    for word in argv:
        option, equals, value = word.partition("=")
        name = option.removeprefix("--") if option.startswith("--") else ""
        if name in FIXED:
            raise UserError(f"setting {name} is {FIXED[name]} in this version; leave {option} out")
        if present := RENAMED.get(name):
            _log.warning("setting %s is called %s now", name, present)
            option = f"--{present}"
        words.append(option + equals + value)
    return words
