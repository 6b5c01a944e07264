"""Names of exchangeable parts: a known name, or the import path `module:attribute` of a part outside the package."""

import re
import sys
import traceback
from collections.abc import Collection, Iterable, Mapping
from importlib import import_module
from typing import Any, TypeVar

from llmgr_rec.errors import UserError, did_you_mean

T = TypeVar("T")

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def is_import_path(name: str) -> bool:
    """Whether a name is to be imported: it has a colon, which no known name has."""
    return ":" in name


def resolve(name: str, known: Mapping[str, T], what: str) -> T:
    """What a name stands for.

    Args:
        name: Key of `known`, or an import path such as `my_package.encoders:MeanPool`, whose module is imported.
        known: The registry.
        what: Where the name stands, for messages, such as `setting encoder.name`.

    Returns:
        The entry of the registry, or the attribute as it is found: the caller checks its type.

    Raises:
        UserError: The name is unknown, or its module cannot be imported or lacks the attribute.
    """
    if not is_import_path(name):
        if name not in known:
            raise UserError(
                f"{what} is {name}, which is neither known nor an import path module:attribute{did_you_mean(name, known)}"
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
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{what} is {name}, but importing {module_name} failed in {place.filename}:{place.lineno} ({said}); "
            "correct that module"
        ) from error
    found: Any = getattr(module, attribute, None)
    if found is None:
        names = [other for other in vars(module) if not other.startswith("_")]
        raise UserError(f"{what} is {name}, but {module_name} has no {attribute}{did_you_mean(attribute, names)}")
    return found


def resolve_class(name: str, known: Mapping[str, type[T]], what: str, base: type[T]) -> type[T]:
    """`resolve` for registries of classes.

    Args:
        name: As in `resolve`.
        known: The registry.
        what: Where the name stands.
        base: Class that an imported one must be derived from.

    Raises:
        UserError: As in `resolve`, or the import path leads to something else than a class derived from `base`.
    """
    found = resolve(name, known, what)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(
            f"{what} is {name}, which is no subclass of {base.__module__}.{base.__name__}; derive it from that"
        )
    return found


def require_allowed(names: Mapping[str, str], allow_code: Collection[str], source: str) -> None:
    """Refuses import paths that a file brings along: a file from somewhere else must not choose what code runs.

    A module that the process has imported already runs no further code, so its names are allowed.

    Args:
        names: Names by setting, as the file has them.
        allow_code: Modules and packages (with all that is in them) that may be imported.
        source: The file, for messages.

    Raises:
        UserError: A name is an import path into a module that is neither allowed nor imported.
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


def modules_of(names: Iterable[str]) -> list[str]:
    """Modules of those names that are import paths."""
    return [name.split(":")[0] for name in names if is_import_path(name)]


def _split(name: str, what: str) -> tuple[str, str]:
    if not _IMPORT_PATH.fullmatch(name):
        raise UserError(
            f"{what} is {name}, which is no import path; give module:attribute, such as my_package.parts:Name"
        )
    module, attribute = name.split(":")
    return module, attribute
