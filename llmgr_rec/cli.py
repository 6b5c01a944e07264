"""What all entry points share: argument parsing with helpful errors, one-line user errors, progress bars."""

import difflib
import errno
import logging
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from llmgr_rec.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from tqdm import tqdm

EXIT_USER_ERROR = 2
# What a user does about a file that cannot be written, wherever that shows.
_MENDABLE = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EROFS: "give a place that can be written to",
    errno.EACCES: "give a place that you may use",
    errno.ENAMETOOLONG: "give a shorter name",
}
_OWN_PACKAGES = ("llmgr_rec", "datagen", "torchx_components")
# Ranks start within a few seconds of each other, more on a loaded machine.
_FIRST_RANK_SPEAKS_S = 15.0


def run_cli(main: Callable[[Sequence[str]], None]) -> None:
    """Runs an entry point; what a user can mend becomes one line on stderr and exit code 2."""
    set_up_messages()
    try:
        main(sys.argv[1:])
    except UserError as error:
        _tell(error)
        sys.exit(EXIT_USER_ERROR)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in _OWN_PACKAGES:
            raise
        sys.stderr.write(
            f"error: package {package} is not installed in {sys.prefix}; "
            "activate the environment that `make venv` builds, and see python -m llmgr_rec.doctor\n"
        )
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        _tell(UserError(f"{error.filename or 'a file'}: {os.strerror(error.errno)}; {_MENDABLE[error.errno]}"))
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)


def _tell(error: UserError) -> None:
    """Says what is wrong, once for all ranks.

    Ranks fail together as a rule. The first one speaks and exits, at which its launcher ends the others: they must not
    exit before it, or it would be ended without having spoken. One that is still there later has an error of its own.
    """
    if is_first_rank():
        sys.stderr.write(f"error: {error}\n")
        return
    time.sleep(_FIRST_RANK_SPEAKS_S)
    sys.stderr.write(f"error: rank {os.environ['RANK']}: {error}\n")


def set_up_messages() -> None:
    """Lets our own log lines through to stderr, from the first rank; of the libraries below only what is wrong."""
    logger = logging.getLogger("llmgr_rec")
    logger.setLevel(logging.INFO if is_first_rank() else logging.ERROR)
    logger.propagate = False
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    for name in ("torch", "torch.fx._symbolic_trace", "torchrec", "fbgemm_gpu", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.")


def is_first_rank() -> bool:
    """Whether this process speaks for the run (rank 0, or not launched by torchrun)."""
    return os.environ.get("RANK", "0") == "0"


def make_parser(prog: str, description: str) -> "ArgumentParser":
    """A jsonargparse parser whose errors come back as exceptions, for `parse_args` to explain."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class _Formatter(DefaultHelpFormatter):
        def __init__(self, prog: str) -> None:
            super().__init__(prog, max_help_position=40, width=120)

    return ArgumentParser(
        prog=f"python -m {prog}",
        description=description,
        exit_on_error=False,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )


def add_run_argument(parser: "ArgumentParser") -> None:
    """Adds --run. torchrun takes that for an abbreviation of its own --run-path, so --run_folder means the same."""
    parser.add_argument(
        "--run",
        "--run_folder",
        type=str,
        required=True,
        help="Run folder made by llmgr_rec.train; under torchrun, say --run_folder.",
    )


def parse_args(parser: "ArgumentParser", argv: Sequence[str]) -> "Namespace":
    """Parses arguments; an unknown or ill-typed one is a `UserError` that names the nearest known setting.

    Args:
        parser: A parser from `make_parser`.
        argv: Arguments. The parser's own module name as a first word is skipped, because `dist.ddp llmgr_rec.train`
            passes it on, and so is a `--` after it.
    """
    from argparse import ArgumentError

    words = list(argv)
    if words and words[0] == parser.prog.split()[-1]:
        words = words[2:] if words[1:2] == ["--"] else words[1:]
    try:
        return parser.parse_args(words)
    except ArgumentError as error:
        raise UserError(_explain(str(error), parser, words)) from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(_explain(str(error), parser, words)) from None


def _explain(message: str, parser: "ArgumentParser", words: Sequence[str]) -> str:
    line = " ".join(message.split())
    known = sorted(_known_settings(parser))
    unknown = re.search(r"[Uu]nrecognized arguments: (.*)", line)
    if unknown:
        name = unknown.group(1).split()[0].lstrip("-").split("=")[0]
        return f"unknown option --{name}{_near_miss(name, known)}; see --help for all options"
    nested = re.search(r"Group '([\w.]+)' does not accept \w+ '([\w.]+)'", line)
    top = re.search(r"Option '([\w.]+)' is not accepted", line)
    if nested or top:
        name = ".".join((nested or top).groups())  # type: ignore[union-attr]
        return f"unknown setting {name}{_config_named(words)}{_near_miss(name, known)}; see --help for all settings"
    # A setting of several types tells of each of them why it is none.
    several = r"Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors: .* Given value: (.*)"
    line = re.sub(several, lambda found: f"Expected {found[1].replace(', ', ' or ')}. Got value: {found[2]}", line)
    line = re.sub(r'Parser key "([\w.]+)":', r"setting \1:", line).replace("typing.", "")
    return f"{line.rstrip('.')}{_config_named(words)}; see --help"


def _near_miss(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or [
        other for other in known if other.split(".")[-1] == name.split(".")[-1]
    ]
    return f", did you mean {matches[0]}?" if matches else ""


def _known_settings(parser: "ArgumentParser") -> Iterator[str]:
    for action in parser._actions:
        for option in action.option_strings:
            if option.startswith("--"):
                yield option[2:]


def _config_named(words: Sequence[str]) -> str:
    for position, word in enumerate(words):
        if word == "--config" and position + 1 < len(words):
            return f" (in {words[position + 1]} or on the command line)"
        if word.startswith("--config="):
            return f" (in {word.split('=', 1)[1]} or on the command line)"
    return ""


def progress(total: int | None, description: str, unit: str = "it", initial: int = 0) -> "tqdm[Any]":
    """A progress bar with an ETA: rank 0 only, silent where there is no terminal or several processes would share it.

    Launchers such as TorchX give their children files for stderr; the environment variable LLMGR_TERMINAL names the
    terminal that the user watches then.

    Args:
        total: Units of work in all, None when unknown.
        description: What is being done.
        unit: Name of one unit.
        initial: Units already done, after a resume.
    """
    from tqdm import tqdm

    alone = is_first_rank() and multiprocessing.parent_process() is None
    terminal = _terminal() if alone else None
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        disable=terminal is None,
        file=terminal,
        dynamic_ncols=True,
    )


def _terminal() -> TextIO | None:
    if sys.stderr.isatty():
        return sys.stderr
    try:
        return open(os.environ["LLMGR_TERMINAL"], "w")
    except (KeyError, OSError):
        return None
