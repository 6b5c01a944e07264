"""Which files of a model folder are read: config.json, the tokenizer files and safetensors.

A folder may come from somebody else, so nothing in it may run code. Modules that it names in `auto_map` are not run,
pickled weights are not loaded, adapters are not applied (their settings may name modules to import), and weights
outside of the folder are not read.
"""

import functools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmgr_rec.errors import UserError

logger = logging.getLogger(__name__)

_WEIGHTS = (".safetensors", ".safetensors.index.json")


def check_model_folder(folder: Path) -> None:
    """Checks that a folder has configuration and safetensors, and names no other weights.

    Args:
        folder: Folder of a transformers model.

    Raises:
        UserError: A file is missing or unreadable, or the weights are an adapter, pickled, or outside of the folder.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"llm.name_or_path: {folder} has no config.json; give the folder of a transformers model")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"llm.name_or_path: {folder} has no *.safetensors; pickled weights are never read, "
            "convert them with save_pretrained(folder, safe_serialization=True)"
        )
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"llm.name_or_path: {folder} has an adapter (adapter_config.json), which is never applied; save the model "
            "with the adapter merged into its weights (merge_and_unload of peft), or remove the adapter"
        )
    for name in _weight_files(folder):
        if not (isinstance(name, str) and name == Path(name).name and name.endswith(_WEIGHTS)):
            raise UserError(
                f"llm.name_or_path: {folder} names the weights {name!r}, which are not a safetensors file of this "
                "folder; save the model again with save_pretrained(folder, safe_serialization=True)"
            )
    _warn_of_code(folder)


@contextmanager
def one_line_errors(folder: Path, what: str, fix: str) -> Iterator[None]:
    """Turns an error of transformers, which depends on the content of the folder, into one line.

    Args:
        folder: Folder of a transformers model.
        what: What the block reads, such as `tokenizer`.
        fix: What the user can do.

    Raises:
        UserError: The block raised an error, for example because the folder needs its own code.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            raise UserError(
                f"llm.name_or_path: the {what} in {folder} needs code of its own (auto_map), and model code from "
                "folders is not run; give a model that transformers has a class for"
            ) from None
        raise UserError(f"llm.name_or_path: cannot load the {what} in {folder} ({first_line(error)}); {fix}") from error


def first_line(error: BaseException) -> str:
    """First line of an error's message; its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@functools.cache
def _warn_of_code(folder: Path) -> None:
    """Says once that the class of transformers is used for a folder that has a class of its own as well."""
    if "auto_map" in _read_json(folder / "config.json"):
        logger.warning("%s names code of its own (auto_map), which is not run; transformers' own class is used", folder)


def _weight_files(folder: Path) -> list[Any]:
    """Names of weight files in the index of the shards and in config.json, in which transformers looks for one."""
    named = [_read_json(folder / "config.json").get("transformers_weights")]
    for index in folder.glob("*.safetensors.index.json"):
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"llm.name_or_path: {index} has no weight_map; copy the model again")
        named += dict.fromkeys(map(str, shards.values()))
    return [name for name in named if name is not None]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        problem = f"llm.name_or_path: {file} is not readable ({first_line(error)}); copy the model again"
        raise UserError(problem) from None
    if not isinstance(content, dict):
        raise UserError(f"llm.name_or_path: {file} is not a JSON object; copy the model again")
    return content
