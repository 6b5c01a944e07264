"""Imports of torch and TorchRec in less time, and without what they do to the process.

Imports only the standard library and `versions`.
"""

import gc
import importlib.abc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from llmgr_rec.versions import version_error

# torch._dynamo sets this variable when it is imported (torch 2.13).
_INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"
# Read by pyarrow when it is imported.
_ARROW_POOL = "ARROW_DEFAULT_MEMORY_POOL"
_FX = "torch.fx._symbolic_trace"


@contextmanager
def collector_paused() -> Iterator[None]:
    """Within the context, modules are imported without the garbage collector.

    Imports of large libraries make about a million objects, all of which stay. The collector would traverse them again
    and again, which takes a fifth of the time of the imports.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            # Moves all objects to the oldest generation. Otherwise, the next collection would traverse them after all.
            gc.freeze()
            gc.unfreeze()
        if was_enabled:
            gc.enable()


@contextmanager
def command_imports() -> Iterator[None]:
    """Within the context, a command imports its modules: without the garbage collector, and without pandas.

    pyarrow imports pandas, where it is installed, when it makes its first array. That takes 20 MB and 0.3 s, and no
    command needs it. If code of the user calls a method of pyarrow that does, pyarrow imports it then.

    pyarrow gets memory from the C library, and not from an allocator of its own, which keeps some 45 MB of what it has
    freed.

    Raises:
        UserError: The installed versions of torch, torchrec and fbgemm do not work together.
    """
    if error := version_error():
        raise error
    with collector_paused():
        if _is_command() and "pandas" not in sys.modules:
            os.environ.setdefault(_ARROW_POOL, "system")
            finder = _WithoutPandas()
            sys.meta_path.insert(0, finder)
            try:
                import pyarrow

                pyarrow.array([0])
            finally:
                sys.meta_path.remove(finder)
        yield


class _WithoutPandas(importlib.abc.MetaPathFinder):
    """Import of pandas fails as if it were not installed."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def _is_command() -> bool:
    """Whether this process is a command, in which no other code expects that pyarrow recognizes data frames."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec is not None and spec.name.startswith("llmgr_rec.")


@contextmanager
def process_unchanged() -> Iterator[None]:
    """Within the context, importing torch, torchrec and fbgemm leaves environment and log handlers as they are.

    fbgemm 1.8 logs to the root logger when it is imported, which gives it a handler, so that a later call of
    `logging.basicConfig` would have no effect.

    Raises:
        UserError: A library cannot be loaded, because the installed versions do not work together.
    """
    before = os.environ.get(_INDUCTOR_CACHE)
    placeholder = logging.NullHandler()
    if not logging.root.handlers:
        logging.root.addHandler(placeholder)
    try:
        yield
        _warn_of_fx_unseen()
    except OSError as error:
        raise version_error() or error from None
    finally:
        logging.root.removeHandler(placeholder)
        if before is None:
            os.environ.pop(_INDUCTOR_CACHE, None)


def _warn_of_fx_unseen() -> None:
    """Takes the warning that torch logs once, when torchrec makes its first batch: it is for authors of libraries."""
    warn = getattr(sys.modules.get(_FX), "is_fx_tracing_warning", None)
    logger = logging.getLogger(_FX)
    if warn is None or logger.disabled:
        return
    logger.disabled = True
    try:
        warn()
    finally:
        logger.disabled = False
