"""JSON index files, which say what a folder contains: read into data classes, with checked types and a checksum."""

import json
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from llmgr_rec.checksums import CHECKSUM_PREFIX, Checksum

T = TypeVar("T")

# Key of the checksum of all other values.
CHECKSUM = "checksum"


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of an index file with its checksum.

    Args:
        content: JSON values by name.
    """
    return {**content, CHECKSUM: _content_checksum(content)}


def unseal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of an index file without its checksum, which is verified.

    Files of earlier versions have no checksum, neither of their content nor of anything else. Who has edited a file
    says so by null in place of its checksum.

    Args:
        content: From `read_json`.

    Raises:
        ValueError: The content is not that of the checksum, or the checksum is missing although there are others.
    """
    values = {name: value for name, value in content.items() if name != CHECKSUM}
    if CHECKSUM not in content and f'"{CHECKSUM_PREFIX}' in json.dumps(values):
        raise ValueError(f"missing field {CHECKSUM}; if you have edited the file, add it with the value null")
    recorded = content.get(CHECKSUM)
    if recorded is not None and (found := _content_checksum(values)) != recorded:
        raise ValueError(
            f"the checksum of its content is {found}, recorded was {recorded}; if you have edited the file, set its "
            f"field {CHECKSUM} to null"
        )
    return values


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: The file, in UTF-8.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"it contains a {type(content).__name__}, not an object")
    return content


def from_json(kind: type[T], value: Any, where: str = "") -> T:
    """A value of a type from JSON values: data classes from objects, tuples from lists, the rest as it is.

    Args:
        kind: A data class, or a type of which its fields may be.
        value: From `read_json`.
        where: Place of the value, for the error message.

    Raises:
        ValueError: A field is missing, unknown or of another type.
    """
    converted: Any = _convert(kind, value, where)
    return converted


def _convert(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        return _convert_fields(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {name: _convert(arguments[1], entry, f"{where}.{name}") for name, entry in value.items()}
    if origin is list and isinstance(value, list):
        return [_convert(arguments[0], entry, f"{where}[{number}]") for number, entry in enumerate(value)]
    if origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        return tuple(
            _convert(part, entry, f"{where}[{number}]")
            for number, (part, entry) in enumerate(zip(arguments, value, strict=True))
        )
    if origin in (Union, types.UnionType):
        for part in arguments:
            with suppress(ValueError):
                return _convert(part, value, where)
    if (origin is Literal and value in arguments) or _is_a(kind, value):
        return value
    wanted = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise ValueError(f"{where} is {_short(value)}, not {wanted}")


def _convert_fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'it'} is {_short(value)}, not an object")
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind) if field.init}
    prefix = f"{where}." if where else ""
    if unknown := sorted(value.keys() - known.keys()):
        raise ValueError(f"unknown field {prefix}{unknown[0]}")
    for name, field in known.items():
        if name not in value and field.default is field.default_factory is MISSING:
            raise ValueError(f"missing field {prefix}{name}")
    return kind(**{name: _convert(hints[name], entry, f"{prefix}{name}") for name, entry in value.items()})


def _is_a(kind: Any, value: Any) -> bool:
    if kind is Any:
        return True
    if kind is types.NoneType:
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _content_checksum(content: Mapping[str, Any]) -> str:
    checksum = Checksum()
    checksum.update(json.dumps(content, sort_keys=True).encode())
    return checksum.text()
