"""Prompt templates: a YAML file with the templates of some tasks, or of all."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from llmgr_rec.errors import UserError, did_you_mean
from llmgr_rec.yaml_file import read_yaml

Task = Literal["behave", "align", "structure_graph", "structure_nodes"]
Placeholder = Literal["graph", "nodes", "text"]

# Placeholders that a template of each task may use.
_PLACEHOLDERS: dict[Task, tuple[Placeholder, ...]] = {
    "behave": ("graph", "nodes", "text"),
    "align": ("graph", "nodes", "text"),
    "structure_graph": ("graph",),
    "structure_nodes": ("nodes",),
}
# Placeholders of which a template must use at least one; without it, the prompts of all sessions would be the same.
_REQUIRED: dict[Task, tuple[Placeholder, ...]] = {
    "behave": ("graph", "nodes"),
    "align": ("text",),
    "structure_graph": ("graph",),
    "structure_nodes": ("nodes",),
}
# Key of a file of templates: the built-in file that has those of the other tasks.
_BASE = "base"
_DEFAULT_BASE = "compact"
_OPTIONAL_PART = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class PromptTemplate:
    """Prompt template of one task.

    Args:
        task: Task of the prompt.
        source: File of the template, for error messages.
        text: Text with the placeholders {graph}, {nodes} and {text}. A part in [[double brackets]] that contains {text}
            is omitted from prompts without item text.
    """

    task: Task
    source: str
    text: str

    def segments(self, with_text: bool = True) -> Iterator[str]:
        """Splits the template: constant texts at even positions, names of placeholders at odd positions.

        Args:
            with_text: Whether the prompt shows item text; if not, {text} and its [[optional part]] are omitted.
        """
        shown = _OPTIONAL_PART.sub(lambda part: self._optional(part.group(1), with_text), self.text)
        if not with_text:
            shown = shown.replace("{text}", "")
        yield from _PLACEHOLDER.split(shown)

    @staticmethod
    def _optional(part: str, with_text: bool) -> str:
        return part if with_text or "{text}" not in part else ""


def load_templates(name_or_path: str) -> dict[Task, PromptTemplate]:
    """Reads a file of prompt templates.

    Args:
        name_or_path: Name of a built-in file, such as `default`, or path of a YAML file that maps tasks to their
            templates. The templates that it does not have are those of `compact`, or of the built-in file that its key
            `base` names.

    Returns:
        The template of every task.

    Raises:
        UserError: The file is missing or not valid YAML, or has an unknown task or placeholder.
    """
    file, texts = _read(name_or_path)
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise UserError(f"{file} must map tasks ({', '.join(_PLACEHOLDERS)}) to the texts of their prompts")
    for task in texts:
        if task not in _PLACEHOLDERS and task != _BASE:
            known = (*_PLACEHOLDERS, _BASE)
            raise UserError(f"{file}: unknown task {task}{did_you_mean(str(task), known)}")
    if all(task in texts for task in _PLACEHOLDERS):
        templates: dict[Task, PromptTemplate] = {}
    else:
        templates = _base_templates(texts.get(_BASE, _DEFAULT_BASE), file)
    own = {task: parse_template(task, texts[task], file) for task in _PLACEHOLDERS if task in texts}
    return {task: own[task] if task in own else templates[task] for task in _PLACEHOLDERS}


def save_templates(name_or_path: str, path: Path) -> None:
    """Writes the templates of all tasks as one file, which `load_templates` reads.

    Args:
        name_or_path: As in `load_templates`.
        path: File to write.
    """
    import yaml

    texts = {str(task): template.text for task, template in load_templates(name_or_path).items()}
    path.write_text(yaml.safe_dump(texts, sort_keys=False, width=120))


def parse_template(task: Task, text: str, source: str) -> PromptTemplate:
    """Makes a template and checks its placeholders.

    Args:
        task: Task of the prompt.
        text: Text with placeholders.
        source: File of the template, for error messages.

    Raises:
        UserError: A placeholder is unknown, repeated, not available for the task, or missing.
    """
    names = _PLACEHOLDER.findall(text)
    where = f"{source}: template {task}"
    for name in names:
        if name not in get_args(Placeholder):
            raise UserError(f"{where} has an unknown placeholder {{{name}}}{did_you_mean(name, get_args(Placeholder))}")
        if name not in _PLACEHOLDERS[task]:
            raise UserError(f"{where} has {{{name}}}, which is not available for this task; remove it")
        if names.count(name) > 1:
            raise UserError(f"{where} has {{{name}}} twice; use it once")
    if not set(names) & set(_REQUIRED[task]):
        required = " or ".join(f"{{{name}}}" for name in _REQUIRED[task])
        raise UserError(f"{where} lacks {required}, so the prompts of all sessions would be the same; add it")
    return PromptTemplate(task, source, text)


def _base_templates(base: str, file: str) -> dict[Task, PromptTemplate]:
    if base not in (names := _built_in()):
        raise UserError(f"{file}: base is {base}, which is no built-in file of templates{did_you_mean(base, names)}")
    return load_templates(base)


def _read(name_or_path: str) -> tuple[str, Any]:
    names = _built_in()
    if name_or_path in names:
        return f"{name_or_path}.yaml", read_yaml(names[name_or_path])
    file = Path(name_or_path).expanduser()
    if not file.is_file():
        raise UserError(
            f"prompt.templates: {name_or_path} is neither a readable file nor a built-in one"
            f"{did_you_mean(name_or_path, names)}"
        )
    return name_or_path, read_yaml(file)


def _built_in() -> dict[str, Path]:
    """Built-in files of templates by name."""
    folder = Path(str(files("llmgr_rec.recipes"))) / "prompts"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
