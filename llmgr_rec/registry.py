"""Lookup of encoders, heads and baselines: by registered name, or by import path `module:attribute`."""

import difflib
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, TypeVar

from llmgr_rec.errors import UserError, did_you_mean

T = TypeVar("T")

# Similarity from which another module is suggested; there are hundreds of modules, so this is stricter than usual.
_CLOSE = 0.8
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def is_import_path(name: str) -> bool:
    """Whether a name is an import path: it contains a colon, which no registered name does."""
    return ":" in name


def modules_of(names: Iterable[str]) -> list[str]:
    """Modules of the import paths among names of parts."""
    return [name.partition(":")[0] for name in names if is_import_path(name)]


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
    if module_name == "__main__":
        raise UserError(
            f"{what} is {name}, but other processes cannot import what a script or notebook defines; move it into a "
            "module"
        )
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{what} is {name}, but there is no module {_missing(error.name or module_name)}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} is {name}, but importing {module_name} {_failure(error)}") from error
    part: Any = getattr(module, attribute, None)
    if part is None:
        names = [other for other in vars(module) if not other.startswith("_")]
        raise UserError(f"{what} is {name}, but {module_name} has no {attribute}{did_you_mean(attribute, names)}")
    return part


def resolve_class(
    name: str, known: Mapping[str, type[T]], what: str, base: type[T], arguments: Sequence[str]
) -> type[T]:
    """`resolve` for registries of classes.

    Args:
        name: As in `resolve`.
        known: The registry.
        what: Source of the name, for messages.
        base: Required base class.
        arguments: Names of the arguments with which the class is called.

    Raises:
        UserError: As in `resolve`, or the object is not a subclass of `base`, lacks a method of it, or cannot be called
            with these arguments.
    """
    part = resolve(name, known, what)
    if not (isinstance(part, type) and issubclass(part, base)):
        raise UserError(
            f"{what} is {name}, which is not a subclass of {base.__module__}.{base.__name__}; derive it from that class"
        )
    if lacking := sorted(getattr(part, "__abstractmethods__", ())):
        raise UserError(f"{what} is {name}, which lacks the method {lacking[0]}; define it")
    check_call(part, name, what, arguments)
    return part


def check_call(part: Callable[..., object], name: str, what: str, arguments: Sequence[str]) -> None:
    """Checks that a part can be called with positional arguments.

    Args:
        part: The class or function.
        name: Its name or import path.
        what: Source of the name, for messages.
        arguments: Names of the arguments, in order.

    Raises:
        UserError: Its signature does not accept them.
    """
    try:
        signature = inspect.signature(part)
    except ValueError:
        # Some callables of extension modules do not tell their signature.
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        shown = ", ".join(signature.parameters)
        raise UserError(
            f"{what} is {name}, which takes ({shown}), but is called with ({', '.join(arguments)}): {error}; "
            "change its arguments"
        ) from None


def construct(part: Callable[..., T], name: str, what: str, *arguments: object) -> T:
    """Calls a part, and reports a failure of code from outside in one line.

    Args:
        part: The class or function, from `resolve`.
        name: Its name or import path.
        what: Source of the name, for messages.
        arguments: Arguments of the call.

    Raises:
        UserError: The part has an import path and raised an exception.
    """
    try:
        return part(*arguments)
    except UserError:
        raise
    except Exception as error:
        if not is_import_path(name):
            raise
        raise UserError(f"{what} is {name}, but calling it {_failure(error)}") from error


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


def _missing(module: str) -> str:
    """A module that was not found, and how to fix it."""
    parent, _, leaf = module.rpartition(".")
    if parent in sys.modules and not hasattr(sys.modules[parent], "__path__"):
        return f"{module}; {parent} is a module, write {parent}:NAME"
    folders = getattr(sys.modules.get(parent), "__path__", None) if parent else None
    names = [found.name for found in pkgutil.iter_modules(folders)]
    if close := difflib.get_close_matches(leaf, names, n=1, cutoff=_CLOSE):
        return f"{module}, did you mean {parent}{'.' if parent else ''}{close[0]}?"
    return f"{module}; install it, or put its folder on PYTHONPATH"


def _failure(error: BaseException) -> str:
    """Where and why code from outside failed, and how to fix it."""
    if isinstance(error, SyntaxError):
        place, reason = f"{error.filename}:{error.lineno}", f"SyntaxError: {error.msg}"
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place, reason = f"{frame.filename}:{frame.lineno}", " ".join(f"{type(error).__name__}: {error}".split())
    return f"failed in {place} ({reason}); correct that code"


def _split(name: str, what: str) -> tuple[str, str]:
    if not _IMPORT_PATH.fullmatch(name):
        raise UserError(
            f"{what} is {name}, which is not an import path; give module:attribute, such as my_package.parts:Name"
        )
    module, attribute = name.split(":")
    return module, attribute
