"""The log on stderr: lines to read, or one JSON object a line for collectors of logs (LLMGR_LOG_FORMAT=json)."""

import json
import logging
import os
import sys
from datetime import UTC, datetime

from llmgr_rec.errors import UserError, did_you_mean
from llmgr_rec.process_facts import peak_memory_mb, rank, run_id

VARIABLE = "LLMGR_LOG_FORMAT"
_FORMATS = ("text", "json")


def is_json() -> bool:
    """Whether the log is JSON.

    Raises:
        UserError: The environment variable has another value than text or json.
    """
    value = os.environ.get(VARIABLE) or "text"
    if value not in _FORMATS:
        raise UserError(f"environment variable {VARIABLE} is {value}{did_you_mean(value, _FORMATS)}")
    return value == "json"


def log_formatter() -> logging.Formatter:
    """The formatter of the log.

    Raises:
        UserError: As for `is_json`.
    """
    if is_json():
        return _JSONFormatter()
    return logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")


def write_last_line(line: str) -> None:
    """Writes why this process ends to stderr, as it is or as JSON.

    Args:
        line: Text; `error: ` at its start gives the level in JSON.
    """
    try:
        as_json = is_json()
    except UserError:
        # This is what the line says.
        as_json = False
    if as_json:
        level = logging.ERROR if line.startswith("error: ") else logging.INFO
        record = logging.LogRecord("llmgr_rec", level, "", 0, line.removeprefix("error: "), None, None)
        line = _JSONFormatter().format(record)
    sys.stderr.write(f"{line}\n")


def log_metrics(logger: logging.Logger, values: dict[str, object]) -> None:
    """Logs a record of metrics, in JSON only; lines to read have a summary of it.

    Args:
        logger: Logger of the caller.
        values: JSON values by name, which become keys of the line.
    """
    if is_json():
        logger.info("metrics", extra={"fields": values})


class _JSONFormatter(logging.Formatter):
    """Time (UTC), level, logger, message, run, rank and peak memory of the process, and the fields of the record."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "run_id": run_id(),
            "rank": rank(),
            "memory_mb": peak_memory_mb(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)
