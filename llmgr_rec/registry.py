"""Lookup of encoders, heads and baselines: by registered name, or by import path `module:attribute`."""

import re
import sys
import traceback
from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any, TypeVar

from llmgr_rec.errors import UserError, did_you_mean

T = TypeVar("T")

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def is_import_path(name: str) -> bool:
    """Whether a name is an import path: it contains a colon, which no registered name does."""
    return ":" in name


def resolve(name: str, known: Mapping[str, T], what: str) -> T:
    """The object of a name.

    Args:
        name: Key of `known`, or an import path such as `my_package.encoders:MeanPool`, whose module is imported.
        known: The registry.
        what: Source of the name, for messages, such as `setting encoder.name`.

    Returns:
        The entry of the registry, or the imported attribute, whose type is not checked.

    Raises:
        UserError: The name is unknown, its module cannot be imported, or the module does not have the attribute.
    """
    if not is_import_path(name):
        if name not in known:
            raise UserError(
                f"{what} is {name}, which is neither known nor an import path module:attribute"
                f"{did_you_mean(name, known)}"
            )
        return known[name]
    module_name, attribute = _split(name, what)
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what} is {name}, but there is no module {error.name}; install it, or put its folder on PYTHONPATH"
        ) from None
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{what} is {name}, but importing {module_name} failed in {frame.filename}:{frame.lineno} ({reason}); "
            "correct that module"
        ) from error
    part: Any = getattr(module, attribute, None)
    if part is None:
        names = [other for other in vars(module) if not other.startswith("_")]
        raise UserError(f"{what} is {name}, but {module_name} has no {attribute}{did_you_mean(attribute, names)}")
    return part


def resolve_class(name: str, known: Mapping[str, type[T]], what: str, base: type[T]) -> type[T]:
    """`resolve` for registries of classes.

    Args:
        name: As in `resolve`.
        known: The registry.
        what: Source of the name, for messages.
        base: Required base class.

    Raises:
        UserError: As in `resolve`, or the object is not a subclass of `base`.
    """
    part = resolve(name, known, what)
    if not (isinstance(part, type) and issubclass(part, base)):
        raise UserError(
            f"{what} is {name}, which is not a subclass of {base.__module__}.{base.__name__}; derive it from that class"
        )
    return part


def require_allowed(names: Mapping[str, str], allow_code: Collection[str], source: str) -> None:
    """Refuses import paths in a file, because an untrusted file must not run code.

    Names of modules that are already imported are allowed, because no further code runs.

    Args:
        names: Names in the file, by setting.
        allow_code: Modules and packages (with their submodules) that may be imported.
        source: The file, for messages.

    Raises:
        UserError: A name is an import path of a module that is neither allowed nor imported.
    """
    for setting, name in names.items():
        if not is_import_path(name):
            continue
        module, _ = _split(name, f"{source}: setting {setting}")
        if module not in sys.modules and not any(f"{module}.".startswith(f"{allowed}.") for allowed in allow_code):
            package = module.split(".")[0]
            raise UserError(
                f"{source}: setting {setting} is {name}, which would run code of module {module}; if you trust that "
                f"code, allow it with --allow_code {package} (load_bundle: allow_code=['{package}']), or import "
                "the module first"
            )


def _split(name: str, what: str) -> tuple[str, str]:
    if not _IMPORT_PATH.fullmatch(name):
        raise UserError(
            f"{what} is {name}, which is not an import path; give module:attribute, such as my_package.parts:Name"
        )
    module, attribute = name.split(":")
    return module, attribute
