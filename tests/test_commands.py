"""The commands as people expect them: listed, with examples, with a first and a last line."""

import importlib
import io
import logging
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest

import llmgr_rec
from llmgr_rec import cli
from llmgr_rec.__main__ import main as llmgr
from llmgr_rec.commands import COMMANDS
from llmgr_rec.errors import UserError
from llmgr_rec.first_and_last_line import print_result, print_start
from tests.commands import command_names, main_of
from tests.documented import check_command
from tests.small_run import small_run
from tests.test_repository import metadata

NAMES = [*command_names(), "llmgr_rec.doctor"]


def names_to_type(name: str) -> str:
    """A command as it is typed after python -m."""
    return name.removesuffix(".__main__")


def help_of(name: str) -> str:
    said = io.StringIO()
    with suppress(SystemExit), redirect_stdout(said):
        main_of(name)(["--help"])
    return said.getvalue()


def test_all_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    own = [names_to_type(name).removeprefix("llmgr_rec.") for name in NAMES if name.startswith("llmgr_rec.")]
    assert sorted(own) == sorted(COMMANDS)
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        llmgr(arguments)
        printed = capsys.readouterr().out
        assert printed.startswith("example: llmgr train ")
        assert all(f"  {name} " in printed and command.summary in printed for name, command in COMMANDS.items())
    llmgr(["--version"])
    assert capsys.readouterr().out == f"llmgr_rec {llmgr_rec.__version__}\n"


def test_commands_are_run_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    llmgr(["plan", "--num_items", "1000"])
    assert "\nplan: the tables of sbr fit; about " in capsys.readouterr().out
    for name in ("experiments", "doctor"):
        with pytest.raises(SystemExit):
            llmgr([name, "--help"])
        assert f"python -m llmgr_rec.{name}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"there is no command trian, did you mean train\?; llmgr --help lists all"):
        llmgr(["trian"])


def test_the_installed_program_runs_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _, name = metadata()["scripts"]["llmgr"].partition(":")
    monkeypatch.setattr(sys, "argv", ["llmgr", "trian"])
    monkeypatch.setattr(cli, "configure_logging", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        getattr(importlib.import_module(module), name)()
    assert capsys.readouterr().err == "error: there is no command trian, did you mean train?; llmgr --help lists all\n"


@pytest.mark.parametrize("name", NAMES)
def test_help_opens_with_an_example_that_works(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, empty, usage, *_ = help_of(name).splitlines()
    assert first.startswith(f"example: python -m {names_to_type(name)}")
    assert empty == ""
    assert usage.startswith(f"usage: python -m {names_to_type(name)}")
    check_command(first.removeprefix("example: "), monkeypatch)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


def _prepare(folder: Path) -> list[str]:
    raw = small_run().dataset.path.parent / "raw"
    return ["--interactions", f"{raw}/interactions.parquet", "--output", f"{folder}/dataset", "--threads", "1"]


def _evaluate(folder: Path) -> list[str]:
    run, dataset = small_run().run, small_run().dataset.path
    options = ["--models", "popularity", "--output", f"{folder}/metrics.json"]
    return ["--run", str(run), "--dataset", str(dataset), *options]


def _score(folder: Path) -> list[str]:
    run, sessions = small_run().run, small_run().dataset.path / "test"
    return ["--run", str(run), "--stage", "sbr", "--input", str(sessions), "--output", f"{folder}/scores"]


CALLS: dict[str, tuple[Callable[[Path], list[str]], str, str]] = {
    "datagen.synthetic": (
        lambda folder: ["--output", f"{folder}/raw", "--sessions", "50", "--items", "32"],
        "writes {folder}/raw",
        "interactions.parquet with 4.. rows, items.parquet with 32 rows; wrote {folder}/raw",
    ),
    "llmgr_rec.prepare": (
        _prepare,
        "reads .*/interactions.parquet; writes {folder}/dataset; DuckDB, 1 thread, 1 GiB of memory",
        r"\d+ of \d+ clicks kept, .*; wrote {folder}/dataset",
    ),
    "llmgr_rec.plan": (
        lambda _: ["--num_items", "50", "--world_size", "2"],
        "reads 50 items; for 2 cpu ranks",
        r"the tables of sbr fit; about \d\.\d+ GiB on a rank",
    ),
    "llmgr_rec.evaluate": (
        _evaluate,
        "reads .*/run, .*/dataset; writes {folder}/metrics.json; device cpu, 1 rank, 1 thread per rank",
        r"\d+ test sessions, 60 items; .*; wrote {folder}/metrics.json",
    ),
    "llmgr_rec.score": (
        _score,
        "reads .*/test, .*/sbr; writes {folder}/scores; device cpu, 1 rank, 1 thread per rank",
        r"\d+ sessions, 0 clicks on unknown items skipped, .*; wrote {folder}/scores \(Parquet files: 1\)",
    ),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_commands_print_a_first_and_a_last_line(
    name: str, scratch: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, start, result = CALLS[name]
    caplog.set_level(logging.INFO, "llmgr_rec")
    main_of(name)(arguments(scratch))
    command = name.removeprefix("llmgr_rec.")
    lines = [record.getMessage() for record in caplog.records if record.name == print_start.__module__]
    first = lines[-1]
    expected = rf"llmgr_rec {llmgr_rec.__version__} {command}: {start.format(folder=scratch)}; \d+ GB memory"
    assert re.fullmatch(expected, first), first
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(f"{command}: {result.format(folder=scratch)}", last), last


def test_only_rank_0_prints_the_last_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        print_result("train", "trained sbr", Path("run"))
    assert capsys.readouterr().out == "train: trained sbr; wrote run\n"
