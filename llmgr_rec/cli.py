"""Shared by all commands: argument parsing with suggestions, one-line user errors, logging, and progress bars."""

import difflib
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from llmgr_rec.bounds import check_options
from llmgr_rec.commands import COMMANDS
from llmgr_rec.errors import RankLostError, StopRequested, UserError
from llmgr_rec.files import storage_error
from llmgr_rec.interruption import EXIT_INTERRUPTED, no_signal_is_lost, report_interrupt
from llmgr_rec.log_format import log_formatter, write_last_line
from llmgr_rec.parent_process import PARENT_VARIABLE, end_with_parent
from llmgr_rec.paths import LocalPath, StoragePath, local_path, storage_path

if TYPE_CHECKING:
    from argparse import HelpFormatter

    from jsonargparse import ArgumentParser, Namespace
    from tqdm import tqdm

EXIT_USER_ERROR = 2
# As torch, CUDA, C++ and the operating system say it.
_OUT_OF_MEMORY = re.compile(r"(can't|cannot) allocate memory|out of memory|bad_alloc", re.IGNORECASE)
_MESSAGE_LENGTH = 150
_OWN_PACKAGES = ("llmgr_rec", "datagen", "torchx_components")
# Seconds that other ranks give rank 0 to report an error. Ranks start within a few seconds of each other, more on a
# busy machine.
_RANK0_REPORTS_S = 15.0


def run_cli(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command. Errors that the user can fix become one line on stderr and exit code 2, Ctrl-C becomes code 130.

    SIGTERM becomes `StopRequested`, so that the command removes its temporary files, and exit code 143. Without a
    handler, the first process of a container would ignore it.

    Args:
        main: Entry point; receives the arguments without the program name.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    elif parent := os.environ.get(PARENT_VARIABLE):
        end_with_parent(parent=int(parent))
    threading.excepthook = _report_thread_error
    try:
        configure_logging()
        with _signals(), no_signal_is_lost():
            main(sys.argv[1:])
    except StopRequested as stop:
        if is_rank0():
            write_last_line(str(stop))
        _end_rank(stop.exit_code)
    except RankLostError as error:
        write_last_line(f"error: {error}")
        _end_rank(1)
    except UserError as error:
        _report_error(error)
        sys.exit(EXIT_USER_ERROR)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in _OWN_PACKAGES:
            raise
        write_last_line(
            f"error: package {package} is not installed in {sys.prefix}; "
            "activate the environment built by `make venv`, and run python -m llmgr_rec.doctor"
        )
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        report_interrupt()
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        known = storage_error(error) or _memory_error(error)
        if known is None:
            raise
        _report_error(known)
        sys.exit(EXIT_USER_ERROR)


def _report_thread_error(error: threading.ExceptHookArgs) -> None:
    """Without the stack trace of a full disk, which TensorBoard's thread also reports to the thread that logs."""
    if error.exc_value is None or storage_error(error.exc_value) is None:
        threading.__excepthook__(error)


def _end_rank(code: int) -> NoReturn:
    """Ends this process; a rank of several at once, because its threads may wait for another rank until a timeout."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def _signals() -> Iterator[None]:
    """Raises `StopRequested` on SIGTERM, also where DuckDB makes another exception of it or of Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise StopRequested(number)

    # A process in the background of a shell ignores SIGINT.
    numbers = [signal.SIGTERM, signal.SIGINT]
    before = {number: signal.signal(number, stop) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    except (Exception, KeyboardInterrupt):
        if not received:
            raise
        if received[0] == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise StopRequested(received[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _memory_error(error: Exception) -> UserError | None:
    """The user error of a request for more memory than there is; None if the exception has another reason."""
    if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
        return None
    first = str(error).strip().split("\n")[0]
    return UserError(
        f"there is not enough memory ({first[:_MESSAGE_LENGTH]}); give smaller batches or tables, or more memory"
    )


def _report_error(error: UserError) -> None:
    """Prints a user error once for all ranks.

    Ranks usually fail with the same error. Rank 0 prints it and exits, and the launcher then stops the other ranks. The
    others wait, because a rank that exits first makes the launcher stop rank 0 before it prints. A rank that is still
    running after the wait failed alone and prints its own error.
    """
    # A path in the message may contain line breaks.
    line = "".join(one if one.isprintable() else repr(one)[1:-1] for one in str(error))
    if is_rank0():
        write_last_line(f"error: {line}")
        return
    time.sleep(_RANK0_REPORTS_S)
    write_last_line(f"error: rank {os.environ['RANK']}: {line}")


def configure_logging() -> None:
    """Logs this package to stderr, at level INFO on rank 0 and ERROR on other ranks; other libraries at level ERROR.

    Raises:
        UserError: The environment names a format of the log that there is not.
    """
    formatter = log_formatter()
    logger = logging.getLogger("llmgr_rec")
    logger.setLevel(logging.INFO if is_rank0() else logging.ERROR)
    logger.propagate = False
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logger.handlers = [handler]
    for name in ("torch", "torch.fx._symbolic_trace", "torchrec", "fbgemm_gpu", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.")


def is_rank0() -> bool:
    """Whether this process is rank 0, or was not launched by torchrun."""
    return os.environ.get("RANK", "0") == "0"


def make_parser(prog: str, description: str = "", example: str = "") -> "ArgumentParser":
    """Creates a jsonargparse parser that raises on errors, so that `parse_args` can rewrite the messages.

    Args:
        prog: Module of the command.
        description: What the command does; default: as listed in `commands`.
        example: Arguments of the command with which --help opens; default: as listed in `commands`.
    """
    from jsonargparse import ArgumentParser, DefaultHelpFormatter
    from jsonargparse.typing import register_type

    # Without a type check, because the value stays a str.
    register_type(LocalPath, deserializer=local_path, type_check=_is_never_checked)
    register_type(StoragePath, deserializer=storage_path, type_check=_is_never_checked)

    class _Formatter(DefaultHelpFormatter):
        def __init__(self, prog: str) -> None:
            super().__init__(prog, max_help_position=40, width=120)

    listed = COMMANDS.get(prog.removeprefix("llmgr_rec."))
    opening = f"example: python -m {prog} {example or (listed.example if listed else '')}\n\n"

    class _Parser(ArgumentParser):
        def format_help(self, formatter: "HelpFormatter | None" = None) -> str:
            return opening + str(super().format_help(formatter))

    return _Parser(
        prog=f"python -m {prog}",
        # Not all options: those of train take more than a screen.
        usage=f"python -m {prog} [options]",
        description=description or (listed.summary if listed else ""),
        exit_on_error=False,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )


def _is_never_checked(*_: Any) -> bool:
    return False


def add_run_argument(parser: "ArgumentParser", several: bool = False) -> None:
    """Adds --run and its alias --run_folder, because torchrun takes --run for an abbreviation of its own --run-path.

    Args:
        parser: From `make_parser`; modified in place.
        several: Whether it may be repeated; its value is then a list.
    """
    parser.add_argument(
        "--run",
        "--run_folder",
        type=StoragePath,
        action="append" if several else None,
        required=True,
        help="Run folder written by llmgr_rec.train. "
        + ("Repeat it to compare runs." if several else "Under torchrun, use --run_folder."),
    )


def add_code_argument(parser: "ArgumentParser") -> None:
    """Adds --allow_code; `split_list` reads its value."""
    parser.add_argument(
        "--allow_code",
        type=str,
        default="",
        help="Packages, comma-separated, that the settings of the run and its bundles may import from; needed only "
        "where they contain an import path, as in encoder.name.",
    )


def parse_args(parser: "ArgumentParser", argv: Sequence[str]) -> "Namespace":
    """Parses arguments.

    Args:
        parser: A parser from `make_parser`.
        argv: Arguments. A first word equal to the module name of the parser is skipped, because `dist.ddp
            llmgr_rec.train` passes it on; so is a `--` after it.

    Raises:
        UserError: An argument is unknown or has the wrong type. The message suggests the closest known setting.
    """
    from argparse import ArgumentError

    words = list(argv)
    if words and words[0] == parser.prog.split()[-1]:
        words = words[2:] if words[1:2] == ["--"] else words[1:]
    try:
        namespace = parser.parse_args(words)
    except ArgumentError as error:
        raise UserError(_rewrite_message(str(error), parser, words)) from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(_rewrite_message(str(error), parser, words)) from None
    _convert_repeated_paths(parser, namespace)
    # Groups of settings have bounds of their own.
    check_options({name: value for name, value in namespace.as_dict().items() if not isinstance(value, dict)}, {})
    return namespace


def _convert_repeated_paths(parser: "ArgumentParser", namespace: "Namespace") -> None:
    """Converts the paths of options that may be repeated, because argparse handles those without `storage_path`."""
    for action in parser._actions:
        if action.type is not StoragePath or not (paths := namespace.get(action.dest)):
            continue
        try:
            namespace[action.dest] = [storage_path(path) for path in paths]
        except ValueError as error:
            raise UserError(f"setting {action.dest} is {error}") from None


def _rewrite_message(message: str, parser: "ArgumentParser", words: Sequence[str]) -> str:
    line = " ".join(message.split())
    known = sorted(_known_settings(parser))
    unknown = re.search(r"[Uu]nrecognized arguments: (.*)", line)
    if unknown:
        name = unknown.group(1).split()[0].lstrip("-").split("=")[0]
        return f"unknown option --{name}{_suggestion(name, known)}; see --help for all options"
    nested = re.search(r"Group '([\w.]+)' does not accept \w+ '([\w.]+)'", line)
    top = re.search(r"Option '([\w.]+)' is not accepted", line)
    if nested or top:
        name = ".".join((nested or top).groups())  # type: ignore[union-attr]
        return f"unknown setting {name}{_config_source(words)}{_suggestion(name, known)}; see --help for all settings"
    path = re.search(
        r'Parser key "([\w.]+)": .*?Not of type (?:Local|Storage)Path: (.*?)(?: - Expected a <class .*)?$', line
    )
    if path:
        return f"setting {path[1]} is {path[2]}"
    # For a union type, jsonargparse repeats the whole error for each member type.
    union = r"Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors: .* Given value: (.*)"
    line = re.sub(union, lambda match: f"Expected {match[1].replace(', ', ' or ')}. Got value: {match[2]}", line)
    line = re.sub(r'Parser key "([\w.]+)":', r"setting \1:", line).replace("typing.", "")
    return f"{line.rstrip('.')}{_config_source(words)}; see --help"


def _suggestion(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or [
        other for other in known if other.split(".")[-1] == name.split(".")[-1]
    ]
    return f", did you mean {matches[0]}?" if matches else ""


def _known_settings(parser: "ArgumentParser") -> Iterator[str]:
    for action in parser._actions:
        for option in action.option_strings:
            if option.startswith("--"):
                yield option[2:]


def _config_source(words: Sequence[str]) -> str:
    for position, word in enumerate(words):
        if word == "--config" and position + 1 < len(words):
            return f" (in {words[position + 1]} or on the command line)"
        if word.startswith("--config="):
            return f" (in {word.split('=', 1)[1]} or on the command line)"
    return ""


def progress(
    total: int | None, description: str, unit: str = "it", initial: int = 0, log_lines: bool = True
) -> "tqdm[Any]":
    """A progress bar with an ETA. Shown by rank 0 only, and only on a terminal that no other process writes to.

    Without one, rank 0 logs the progress of long work every `LOG_LINE_SECONDS`. Launchers such as TorchX redirect the
    stderr of their children to files. The environment variable LLMGR_TERMINAL then names the terminal of the user.

    Args:
        total: Total units of work; None if unknown.
        description: Label of the bar.
        unit: Name of one unit.
        initial: Units completed before a resume.
        log_lines: Whether to log the progress where no bar is shown.
    """
    from llmgr_rec.progress_bar import ProgressBar

    is_main_process = is_rank0() and multiprocessing.parent_process() is None
    terminal = _terminal() if is_main_process else None
    return ProgressBar(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        disable=terminal is None,
        file=terminal,
        dynamic_ncols=True,
        log_lines=log_lines and is_main_process,
    )


def _terminal() -> TextIO | None:
    if sys.stderr.isatty():
        return sys.stderr
    try:
        return open(os.environ["LLMGR_TERMINAL"], "w")
    except (KeyError, OSError):
        return None
