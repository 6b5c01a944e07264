"""Prompt templates as data: one YAML file with a template for each task."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

import yaml

from llmgr_rec.errors import UserError, did_you_mean

Task = Literal["behave", "align", "structure_graph", "structure_nodes"]
Place = Literal["graph", "nodes", "text"]

# What each task's reading is made of. A template may leave out all of them but one: without any, every session would
# read the same.
_PLACES: dict[Task, tuple[Place, ...]] = {
    "behave": ("graph", "nodes", "text"),
    "align": ("graph", "nodes", "text"),
    "structure_graph": ("graph",),
    "structure_nodes": ("nodes",),
}
_REQUIRED: dict[Task, tuple[Place, ...]] = {
    "behave": (),
    "align": ("text",),
    "structure_graph": ("graph",),
    "structure_nodes": ("nodes",),
}
_OPTIONAL_PART = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_PLACE = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class PromptTemplate:
    """The prompt of one task.

    Args:
        task: What the prompt is for.
        source: File it came from, for messages.
        text: Wording with the places {graph}, {nodes} and {text}. A part in [[double brackets]] that holds {text} is
            left out where no text is shown.
    """

    task: Task
    source: str
    text: str

    def segments(self, with_text: bool = True) -> Iterator[str]:
        """Constant texts and, at odd positions, names of places, in order.

        Args:
            with_text: Whether text is shown; without it, {text} and its [[optional part]] are left out.
        """
        shown = _OPTIONAL_PART.sub(lambda part: self._optional(part.group(1), with_text), self.text)
        if not with_text:
            shown = shown.replace("{text}", "")
        yield from _PLACE.split(shown)

    @staticmethod
    def _optional(part: str, with_text: bool) -> str:
        return part if with_text or "{text}" not in part else ""


def load_templates(name_or_path: str) -> dict[Task, PromptTemplate]:
    """Reads a file of prompt templates.

    Args:
        name_or_path: Name of a shipped file (`default`) or path to a YAML file that maps each task to its template.

    Raises:
        UserError: The file is absent or no YAML, lacks a task, or names an unknown task or place.
    """
    file, content = _read(name_or_path)
    try:
        templates = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(templates, dict) or not all(isinstance(text, str) for text in templates.values()):
        raise UserError(f"{file} must map each of {', '.join(_PLACES)} to the text of its prompt")
    for task in templates:
        if task not in _PLACES:
            raise UserError(f"{file}: unknown task {task}{did_you_mean(str(task), get_args(Task))}")
    if missing := [task for task in _PLACES if task not in templates]:
        raise UserError(
            f"{file}: no template for {', '.join(missing)}; see the shipped file configs/prompts/default.yaml"
        )
    return {task: parse_template(task, templates[task], file) for task in _PLACES}


def parse_template(task: Task, text: str, source: str) -> PromptTemplate:
    """Checks the places of one template.

    Args:
        task: What the prompt is for.
        text: Wording with places.
        source: Where it came from, for messages.

    Raises:
        UserError: A place is unknown, stands twice, does not belong to the task, or is missing.
    """
    places = _PLACE.findall(text)
    where = f"{source}: template {task}"
    for place in places:
        if place not in get_args(Place):
            raise UserError(f"{where} has an unknown place {{{place}}}{did_you_mean(place, get_args(Place))}")
        if place not in _PLACES[task]:
            raise UserError(f"{where} has {{{place}}}, which its task does not fill; remove it")
        if places.count(place) > 1:
            raise UserError(f"{where} has {{{place}}} twice; a place stands once")
    for place in _REQUIRED[task] or _PLACES[task][:2]:
        if place in places:
            break
    else:
        wanted = " or ".join(f"{{{place}}}" for place in _REQUIRED[task] or _PLACES[task][:2])
        raise UserError(f"{where} lacks {wanted}, so every session would read the same; add it")
    return PromptTemplate(task, source, text)


def _read(name_or_path: str) -> tuple[str, str]:
    shipped = files("llmgr_rec.recipes") / "prompts"
    names = sorted(Path(str(entry)).stem for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
    if name_or_path in names:
        return f"{name_or_path}.yaml", (shipped / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    try:
        return name_or_path, Path(name_or_path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"prompt.templates: {name_or_path} is neither a readable file nor a shipped one"
            f"{did_you_mean(name_or_path, names)}"
        ) from None
