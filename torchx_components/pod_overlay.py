"""Overlays of pods: fields of Kubernetes that TorchX has no option for, such as tolerations and secrets.

An overlay is a YAML file with `spec` and `metadata` of a pod. Mappings are merged, lists are appended, and other values
replace what is there; the one entry of `containers` is merged into the container of the pod. TorchX 0.7.0 has nothing
of the kind, and that of later versions cannot reach into a container without its name, which differs between pods.
"""

import difflib
import json
import re
from pathlib import Path
from typing import Any

import torchx.schedulers.kubernetes_scheduler as scheduler
import yaml
from torchx import specs

from llmgr_rec.errors import UserError, did_you_mean

# Key of the overlay in the metadata of a role.
_KEY = "llmgr_pod_overlay"
_PARTS = ("metadata", "spec")
# Names of types in the client of Kubernetes.
_LIST = re.compile(r"list\[(.+)\]")
_MAPPING = re.compile(r"dict\(str, (.+)\)")
_SCALARS = {"str": (str,), "int": (int,), "bool": (bool,), "float": (int, float)}
_render = scheduler.role_to_pod


def add_overlay(app: specs.AppDef, path: str) -> None:
    """Makes every pod of an application have the fields of an overlay.

    Args:
        app: The application; modified in place. Schedulers other than Kubernetes ignore it.
        path: YAML file.

    Raises:
        UserError: There is no such file, it is no YAML, or it has fields that a pod has not.
    """
    overlay = _read(Path(path))
    for role in app.roles:
        _with_overlay(_render("check", role, None), overlay, path)
        # TorchX makes $ of $$ in the metadata of a role.
        role.metadata[_KEY] = {"path": path, "overlay": json.dumps(overlay).replace("$", "$$")}
    scheduler.role_to_pod = _role_to_pod


def _role_to_pod(name: str, role: specs.Role, *arguments: Any) -> Any:
    """In place of the function of TorchX, whose result it changes where the role has an overlay."""
    pod = _render(name, role, *arguments)
    given = role.metadata.get(_KEY)
    return _with_overlay(pod, json.loads(given["overlay"]), given["path"]) if given else pod


def _read(path: Path) -> dict[str, Any]:
    try:
        overlay = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"overlay {path} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"overlay {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(overlay, dict) or not overlay:
        raise UserError(f"overlay {path} is empty; give fields of a pod, under spec: or metadata:")
    for name in overlay:
        if name not in _PARTS:
            raise UserError(f"overlay {path} has {name}{did_you_mean(str(name), _PARTS)}; give fields of these")
    # Times and other types of YAML that JSON has not become text.
    return dict(json.loads(json.dumps(overlay, default=str)))


def _with_overlay(pod: Any, overlay: dict[str, Any], path: str) -> Any:
    content = scheduler.sanitize_for_serialization(pod)
    assert isinstance(content, dict)
    for part, given in overlay.items():
        if not isinstance(given, dict):
            raise UserError(f"overlay {path}: {part} must be a mapping")
        fields = dict(given)
        containers = fields.pop("containers", None) if part == "spec" else None
        _merge(content[part], fields, f"overlay {path}: {part}")
        if containers is not None:
            _merge(content[part]["containers"][0], _only(containers, path), f"overlay {path}: spec.containers")
    _check(content, "V1Pod", f"overlay {path}: ", "")
    return _parse(content)


def _only(containers: Any, path: str) -> dict[str, Any]:
    if isinstance(containers, list) and len(containers) == 1 and isinstance(containers[0], dict):
        return containers[0]
    raise UserError(f"overlay {path}: spec.containers must be a list of one mapping, which changes the container")


def _merge(content: dict[str, Any], overlay: dict[str, Any], place: str) -> None:
    for name, value in overlay.items():
        present = content.get(name)
        if isinstance(present, dict | list) and type(present) is not type(value):
            raise UserError(f"{place}.{name} must be a {'mapping' if isinstance(present, dict) else 'list'}")
        if isinstance(present, dict):
            _merge(present, value, f"{place}.{name}")
        elif isinstance(present, list):
            present.extend(value)
        else:
            content[name] = value


def _check(value: Any, kind: str, file: str, place: str) -> None:
    """Refuses what the client of Kubernetes would drop or take for something else.

    Args:
        value: Part of a pod, as JSON.
        kind: Its type, as the client names it.
        file: The overlay, as messages open.
        place: Path of the part in the pod.
    """
    from kubernetes.client import models

    if (listed := _LIST.fullmatch(kind)) and isinstance(value, list):
        for one in value:
            _check(one, listed[1], file, place)
    elif (mapped := _MAPPING.fullmatch(kind)) and isinstance(value, dict):
        for name, one in value.items():
            _check(one, mapped[1], file, f"{place}.{name}")
    elif hasattr(models, kind) and isinstance(value, dict):
        types = _field_types(getattr(models, kind))
        for name, one in value.items():
            where = f"{place}.{name}".lstrip(".")
            if name not in types:
                close = difflib.get_close_matches(name, types, n=1)
                raise UserError(f"{file}a pod has no field {where}{f', did you mean {close[0]}?' if close else ''}")
            _check(one, types[name], file, where)
    elif listed or mapped or hasattr(models, kind) or type(value) not in _SCALARS.get(kind, (type(value),)):
        raise UserError(f"{file}{place} is {value!r}; it must be of type {kind.removeprefix('V1')}")


def _field_types(model: Any) -> dict[str, str]:
    return {field: model.openapi_types[name] for name, field in model.attribute_map.items()}


def _parse(content: dict[str, Any]) -> Any:
    from kubernetes import client

    # As TorchX's own overlays do it: the arguments of the public method are others in later versions of the client.
    return client.ApiClient()._ApiClient__deserialize(content, "V1Pod")
