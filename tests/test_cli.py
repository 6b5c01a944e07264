"""User errors become one line and exit code 2."""

import errno
import sys

import pytest

from llmgr_rec.cli import add_run_argument, make_parser, parse_args, run_cli
from llmgr_rec.errors import UserError


def _fail(argv):
    raise UserError("items.parquet has no column title; add it")


def test_a_user_error_is_one_line_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stop:
        run_cli(_fail)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: items.parquet has no column title; add it\n"


def test_other_ranks_wait_for_rank_0_to_report(capsys, monkeypatch):
    """They print only if the launcher has not stopped them by then, because then the error is their own."""
    waited = []
    monkeypatch.setattr("time.sleep", lambda seconds: waited.append((seconds, capsys.readouterr().err)))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        run_cli(_fail)
    assert stop.value.code == 2
    assert waited == [(15.0, "")]
    assert capsys.readouterr().err == "error: rank 1: items.parquet has no column title; add it\n"


def test_a_full_disk_is_one_line_with_a_fix(capsys, tmp_path):
    def fill(argv):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "scores"))

    with pytest.raises(SystemExit) as stop:
        run_cli(fill)
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'scores'}: No space left on device; free some space and run the same command again\n"
    )
    with pytest.raises(FileNotFoundError):
        run_cli(lambda argv: (tmp_path / "absent").open())


def test_a_full_disk_is_found_in_the_errors_of_libraries(capsys):
    """They report it as text, or as the cause of an error of their own."""

    def save(argv):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    def wrapped(argv):
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded", "metrics.jsonl")
        except OSError:
            raise RuntimeError("file write failed")  # noqa: B904

    for main, line in (
        (save, "error: a file: No space left on device; free some space and run the same command again\n"),
        (
            wrapped,
            "error: metrics.jsonl: Disk quota exceeded; free some of your quota and run the same command again\n",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            run_cli(main)
        assert stop.value.code == 2
        assert capsys.readouterr().err == line


def test_ctrl_c_is_one_line_and_exit_code_130(capsys, monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    for rank, line in (("0", "error: interrupted\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            run_cli(interrupted)
        assert (stop.value.code, capsys.readouterr().err) == (130, line)


def test_other_exceptions_keep_their_stack_trace(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda argv: 1 / 0)  # type: ignore[arg-type]


def test_a_missing_package_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda argv: __import__("no_such_package.part"))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: package no_such_package is not installed in ")


def test_a_missing_module_of_ours_keeps_its_stack_trace():
    with pytest.raises(ModuleNotFoundError):
        run_cli(lambda argv: __import__("llmgr_rec.no_such_module"))


def _parser():
    parser = make_parser("llmgr_rec.score", "Scores.")
    parser.add_argument("--output", type=str)
    parser.add_argument("--k", type=int, default=20)
    return parser


def test_an_unknown_option_gets_a_suggestion():
    with pytest.raises(UserError, match=r"unknown option --outptu, did you mean output\?"):
        parse_args(_parser(), ["--outptu", "x"])


def test_a_wrong_type_names_the_option():
    with pytest.raises(UserError, match=r"setting k: .*int.*x"):
        parse_args(_parser(), ["--k", "x"])


def test_the_module_name_is_accepted_as_a_leading_word():
    assert parse_args(_parser(), ["llmgr_rec.score", "--k", "5"]).k == 5
    assert parse_args(_parser(), ["llmgr_rec.score", "--", "--k", "5"]).k == 5
    with pytest.raises(UserError):
        parse_args(_parser(), ["llmgr_rec.other", "--k", "5"])


@pytest.mark.parametrize("option", ["--run", "--run_folder"])
def test_the_run_has_a_name_that_torchrun_does_not_take_for_its_own(option):
    parser = make_parser("llmgr_rec.score", "Scores.")
    add_run_argument(parser)
    assert parse_args(parser, [option, "runs/demo"]).run == "runs/demo"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 7.45 EiB for an array"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes.\nmore"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_too_little_memory_is_one_line(capsys, error):
    def allocate(argv):
        raise error

    with pytest.raises(SystemExit) as stop:
        run_cli(allocate)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: there is not enough memory (")
    assert said.count("\n") == 1
