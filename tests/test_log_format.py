"""The log as JSON: what a line has, and how a process ends in it."""

import json
import logging
import sys

import pytest

from llmgr_rec import cli
from llmgr_rec.errors import UserError
from llmgr_rec.log_format import log_metrics


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: str = "") -> list[str]:
    """Lines on stderr of a command that logs a line and a record of metrics, and then fails if it has to."""

    def main(argv: object) -> None:
        logger = logging.getLogger("llmgr_rec.test")
        logger.info("stage %s starts", "sbr")
        log_metrics(logger, {"stage": "sbr", "step": 3, "loss": 0.5, "examples_per_s": 10.0, "data_wait": 0.1})
        if error:
            raise UserError(error)

    monkeypatch.setattr(sys, "argv", ["command"])
    package = logging.getLogger("llmgr_rec")
    handlers, level, propagate = package.handlers, package.level, package.propagate
    try:
        if error:
            with pytest.raises(SystemExit) as stop:
                cli.run_cli(main)
            assert stop.value.code == 2
        else:
            cli.run_cli(main)
    finally:
        package.handlers, package.propagate = handlers, propagate
        package.setLevel(level)
    return capsys.readouterr().err.splitlines()


def test_each_line_is_an_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLMGR_LOG_FORMAT", "json")
    lines = [json.loads(line) for line in run(monkeypatch, capsys, "no such\nfile")]
    assert [line["message"] for line in lines] == ["stage sbr starts", "metrics", "no such\\nfile"]
    assert [line["level"] for line in lines] == ["INFO", "INFO", "ERROR"]
    for line in lines:
        assert line["time"].endswith("+00:00")
        assert line["run_id"] == lines[0]["run_id"]
        assert line["rank"] == 0
        assert line["memory_mb"] > 10
    assert lines[1]["examples_per_s"] == 10.0
    assert lines[1]["data_wait"] == 0.1


def test_lines_to_read_are_as_before(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("LLMGR_LOG_FORMAT", raising=False)
    first, *rest = run(monkeypatch, capsys, "no such file")
    assert first.endswith(" INFO stage sbr starts")
    assert rest == ["error: no such file"]


def test_an_unknown_format_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLMGR_LOG_FORMAT", "jsn")
    (line,) = run(monkeypatch, capsys, "not reached")
    assert line == "error: environment variable LLMGR_LOG_FORMAT is jsn, did you mean json?"
