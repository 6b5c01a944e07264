"""How a setting is declared: a field of a dataclass with its help, unit, bounds, and what its change invalidates."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from llmgr_rec.bounds import Bounds

StageName = Literal["sbr", "align", "behave", "llm_text"]
# In the order of training. llm_text replaces align and behave: no stage goes on from it.
STAGES: tuple[StageName, ...] = get_args(StageName)

# What has to be made again when a setting changes, from nothing to most:
# - nothing: the setting says how the machine is used.
# - bundle: it is chosen after training; the stage is exported again from its checkpoints.
# - checkpoint: it says how a stage learns; checkpoints of that stage are refused.
# - stages: it says what the weights are; checkpoints are refused, and so is every later stage that goes on from them.
Invalidates = Literal["nothing", "bundle", "checkpoint", "stages"]


@dataclass(frozen=True)
class SettingInfo(Bounds):
    """What stands with a setting beside its type and default; its bounds are those of `Bounds`.

    Args:
        help: Help text.
        unit: Unit of its number; empty where the help text says all.
        invalidates: What has to be made again when it changes.
        stages: Stages that depend on it.
    """

    help: str
    unit: str = ""
    invalidates: Invalidates = "stages"
    stages: tuple[StageName, ...] = STAGES


def setting(default: Any, help: str, **info: Any) -> Any:
    """A field of a settings dataclass; see `SettingInfo` for the keywords."""
    metadata = {"setting": (help, info)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group(cls: type, help: str, /, values: dict[str, Any] | None = None, **info: Any) -> Any:
    """A field of `Config` that holds a group of settings.

    Args:
        cls: The group's dataclass.
        help: Help text of the group.
        values: Defaults of this group that differ from those of its dataclass.
        info: Keywords of `SettingInfo` for all of its settings that do not give their own.
    """
    return field(default_factory=lambda: cls(**(values or {})), metadata={"group": (help, info)})


@dataclass
class Group:
    """Base of the groups of settings."""

    def validate(self, name: str) -> None:
        """Checks rules between the settings of one group.

        Args:
            name: Name of the group.

        Raises:
            UserError: A rule is broken; names settings and fix.
        """
