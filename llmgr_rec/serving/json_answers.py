"""Answers as JSON; an error is one line that says what is wrong and how to fix it."""

import json
from typing import Any

from fastapi.responses import Response

from llmgr_rec.errors import did_you_mean


def json_answer(content: Any, status: int = 200) -> Response:
    """An answer of plain values, lists and mappings.

    Args:
        content: The values.
        status: HTTP status.
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text, status, media_type="application/json")


def error_answer(status: int, line: str, headers: dict[str, str] | None = None) -> Response:
    """An error.

    Args:
        status: HTTP status.
        line: What is wrong and how to fix it.
        headers: Further headers.
    """
    text = "".join(one if one.isprintable() else repr(one)[1:-1] for one in line)
    return Response(json.dumps({"error": text}), status, headers, media_type="application/json")


def invalid_request(errors: list[Any], fields: dict[str, list[str]], path: str) -> str:
    """One line for the first fault that pydantic has found.

    Args:
        errors: The faults.
        fields: Fields of the request of each path.
        path: Path of the request.
    """
    error = errors[0]
    place = _place(error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown field {place}{did_you_mean(place, fields.get(path, []))}"
    if error["type"] == "json_invalid":
        return f"the body is not JSON ({error.get('ctx', {}).get('error', 'unreadable')}); see /openapi.json"
    if error["type"] == "model_attributes_type":
        return "the body is not a JSON object; send one, with the header Content-Type: application/json"
    if error["type"] == "missing":
        return f"{place or 'the body'} is missing; see /openapi.json for an example"
    return f"{place or 'the body'}: {error['msg'].lower()}; see /openapi.json for an example"


def _place(location: tuple[int | str, ...]) -> str:
    """`sessions[0][2]` of the location of a fault, without the types of a union."""
    text = ""
    for part in location[1:]:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in ("int", "str"):
            text += f".{part}" if text else part
    return text[:200]
