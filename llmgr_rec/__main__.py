"""`python -m llmgr_rec` and `llmgr`: list the commands, and run one of them.

    llmgr train --dataset dataset --output run

is `python -m llmgr_rec.train --dataset dataset --output run`.
"""

from collections.abc import Sequence
from importlib import import_module

from llmgr_rec import __version__
from llmgr_rec.cli import run_cli
from llmgr_rec.commands import COMMANDS
from llmgr_rec.errors import UserError, did_you_mean


def main(argv: Sequence[str]) -> None:
    """Lists the commands, or runs the one that the first word names.

    Args:
        argv: A command and its arguments; --help, --version or nothing.

    Raises:
        UserError: There is no such command, or the command raises it.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return
    name, *arguments = argv
    if name == "--version":
        print(f"llmgr_rec {__version__}")
        return
    if name not in COMMANDS:
        raise UserError(f"there is no command {name}{did_you_mean(name, list(COMMANDS))}; llmgr --help lists all")
    module = import_module(f"llmgr_rec.{name}")
    if hasattr(module, "__path__"):
        module = import_module(f"llmgr_rec.{name}.__main__")
    module.main(arguments)


def overview() -> str:
    """The commands, each with its summary."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"example: llmgr train {COMMANDS['train'].example}",
            "",
            "usage: llmgr COMMAND [options], or python -m llmgr_rec.COMMAND [options]",
            "",
            "commands:",
            *lines,
            "",
            "llmgr COMMAND --help lists the options of a command. Converters of CSV files and public data sets are",
            "python -m datagen.csv, .movielens, .amazon and .synthetic.",
        ]
    )


def run() -> None:
    """Entry point of the program `llmgr`."""
    run_cli(main)


if __name__ == "__main__":
    run_cli(main)
