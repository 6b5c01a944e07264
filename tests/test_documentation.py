"""Every documented command exists and takes the options that are shown, and every entry point answers at once."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from llmgr_rec.errors import UserError
from tests.documented import Command, check_command, documented_commands

ROOT = Path(__file__).parents[1]
COMMANDS = list(documented_commands())
ENTRY_POINTS = [
    f"llmgr_rec.{name}"
    for name in ("prepare", "train", "evaluate", "score", "plan", "doctor", "report", "experiments")
    if importlib.util.find_spec(f"llmgr_rec.{name}")
]
HEAVY = {"torch", "torchrec", "transformers", "pyarrow", "duckdb", "scipy", "matplotlib", "numpy"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.place)
def test_a_documented_command_is_right(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    check_command(command.line, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "python -m llmgr_rec.train --confg quickstart",
        "python -m llmgr_rec.train --config quickstrat",
        "python -m llmgr_rec.doctor --cores",
        "python -m llmgr_rec.traim",
        "make demmo",
        "make demo DATE=folder",
        "torchx run -s kubernetes dist.ddp --memmb 1",
        "torchx run -s kubernetes dist.ddp -- --datasett x",
        "torchrun --nproc 2 -m llmgr_rec.train --outputs x",
        "trochrun -m llmgr_rec.train",
    ],
)
def test_a_wrong_command_is_noticed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, UserError, SystemExit, ModuleNotFoundError)):
        check_command(line, monkeypatch)


def test_help_needs_no_heavy_import() -> None:
    code = f"""
import contextlib, importlib, io, sys
for name in {ENTRY_POINTS}:
    said = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said):
        importlib.import_module(name).main(["--help"])
    assert "usage" in said.getvalue().lower(), name
    heavy = {HEAVY} & set(sys.modules)
    assert not heavy, f"{{name}} --help imports {{sorted(heavy)}}"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
