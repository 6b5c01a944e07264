"""Property: any value of any option gives a result, or one line and exit code 2, and writes nothing in the second case.

The commands run until they would start their work, so that thousands of values take seconds. `python -m tests.extremes`
does the work, too.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import pytest

from llmgr_rec.cli import run_cli
from tests.commands import main_of
from tests.extremes import COMMANDS, base_words, cases, delete, write_inputs
from tests.small_run import small_run

# Where each command has checked its options and would start to work.
WORK = (
    "llmgr_rec.distributed.process_group.init_distributed",
    "llmgr_rec.evaluation.report_page.write_report",
    "llmgr_rec.experiments.run_experiment.run_experiment",
    "llmgr_rec.python_api.Recommender.load",
    "llmgr_rec.serving.run_service.Service",
    "llmgr_rec.scoring.program_export.session_program",
    "llmgr_rec.storage.extended_run.write_extended_items",
    "llmgr_rec.data.preparation.pipeline.Database",
    "datagen.conversion.conversion",
    "datagen.planted.plant",
    "torchx_components.pipeline.run_steps",
)
# The default run takes one of this many cases of a command; both are prime, so that each option has other values.
STRIDES = {"llmgr_rec.train": 41}


class _Works(BaseException):
    """The command has accepted its options."""


def _work(*_: Any, **__: Any) -> NoReturn:
    raise _Works


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs = tmp_path_factory.mktemp("extremes")
    write_inputs(inputs)
    small_run()
    return inputs


@pytest.fixture(autouse=True)
def _stopped_before_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    logger = logging.getLogger("llmgr_rec")
    before = (logger.level, logger.propagate, logger.handlers)
    with ExitStack() as stack:
        for name in WORK:
            stack.enter_context(patch(name, _work))
        yield
    logger.level, logger.propagate, logger.handlers = before


def _answer(command: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """How a command answers: it works, it is refused in one line, or what is wrong with the answer."""
    with patch.object(sys, "argv", [command, *words]):
        try:
            run_cli(main_of(command))
        except _Works:
            return "works"
        except SystemExit as stop:
            errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            if stop.code == 2 and len(errors) == 1:
                return "refused"
            return "works" if stop.code in (None, 0) else f"exit code {stop.code}, {errors}"
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        finally:
            capsys.readouterr()
    return "works"


def _problems(command: str, folder: Path, capsys: pytest.CaptureFixture[str], stride: int) -> list[str]:
    base = base_words(command, folder)
    inputs = set(folder.iterdir())
    assert _answer(command, base, capsys) == "works"
    delete(set(folder.iterdir()) - inputs)
    problems = []
    for number, (option, value) in enumerate(cases(command)):
        if number % stride:
            continue
        answer = _answer(command, [*base, f"{option}={value}"], capsys)
        written = set(folder.iterdir()) - inputs
        delete(written)
        if answer not in ("works", "refused") or (answer == "refused" and written):
            problems.append(f"{option} {value[:60]!r}: {answer}, written {written}")
    return problems


@pytest.mark.parametrize("command", COMMANDS)
def test_any_value_gives_a_result_or_one_line(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert _problems(command, folder, capsys, STRIDES.get(command, 13)) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_value_gives_a_result_or_one_line(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert _problems(command, folder, capsys, 1) == []
