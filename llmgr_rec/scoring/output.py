"""Output folder of a scoring job: a manifest of the job, the finished parts, and a marker file of completeness.

A part gets its final name when it is complete, so an interrupted job resumes with the missing parts.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmgr_rec.errors import UserError
from llmgr_rec.files import require_writable
from llmgr_rec.scoring.input import MANIFEST_NAME, Part

SUCCESS_NAME = "_SUCCESS"
FORMAT = "llmgr_rec.scores"
FORMAT_VERSION = 2
# Columns of the output that are not in the input.
OUTPUT_COLUMNS = ("item_ids", "scores", "fallback")

# Parquet schema metadata with the counts of a part.
_UNKNOWN_KEY = b"llmgr_rec.unknown_items"
_FALLBACK_KEY = b"llmgr_rec.fallback_rows"
_LLM_KEY = b"llmgr_rec.llm_rows"


@dataclass(frozen=True)
class Totals:
    """Counts of a complete job.

    Args:
        rows_in: Rows of the input.
        rows_out: Rows of all parts.
        unknown_items: Clicks on unknown items, which were skipped.
        fallback_rows: Sessions without a known item, which got the most popular items.
        llm_rows: Sessions that a language model encoded.
        parts: Output files.
    """

    rows_in: int
    rows_out: int
    unknown_items: int
    fallback_rows: int
    llm_rows: int
    parts: int


class ScoreFolder:
    """Output of one scoring job.

    Args:
        path: The folder, new or of an interrupted job.
        job: All that the output depends on (input, settings, model), as JSON values.
        parts: All parts of the job.
    """

    def __init__(self, path: Path, job: Mapping[str, Any], parts: list[Part]) -> None:
        self.path = path
        self.parts = parts
        listed = [
            {"name": part.name, "file": part.file.name, "first_row": part.first_row, "rows": part.rows}
            for part in parts
        ]
        self._manifest = {"format": FORMAT, "version": FORMAT_VERSION, **job, "parts": listed}

    def open(self) -> None:
        """Creates the folder, or checks that an existing one belongs to the same job.

        Raises:
            UserError: The folder is not a scoring output, belongs to another job, or has a damaged part.
        """
        manifest = self.path / MANIFEST_NAME
        require_writable(self.path)
        if manifest.is_file():
            self._check_same_job(manifest)
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"--output {self.path} is not empty and not a scoring output; give another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink()
        if not manifest.is_file():
            self._write_json(MANIFEST_NAME, self._manifest)
        for part in self.parts:
            if self.is_done(part):
                self._check_part(part)

    def is_done(self, part: Part) -> bool:
        """Whether a part is finished."""
        return (self.path / part.name).is_file()

    def is_complete(self) -> bool:
        """Whether `finish` has marked the folder complete."""
        return (self.path / SUCCESS_NAME).is_file()

    def write(self, part: Part, table: pa.Table, unknown_items: int, fallback_rows: int, llm_rows: int) -> None:
        """Writes a part to a temporary file, which is then renamed.

        Args:
            part: The part.
            table: Rows of the part.
            unknown_items: Clicks on unknown items in its sessions.
            fallback_rows: Sessions that got the most popular items.
            llm_rows: Sessions that a language model encoded.
        """
        counts = {_UNKNOWN_KEY: unknown_items, _FALLBACK_KEY: fallback_rows, _LLM_KEY: llm_rows}
        metadata = {key: str(count).encode() for key, count in counts.items()}
        partial = self.path / f".{part.name}.tmp"
        with partial.open("wb") as file:
            pq.write_table(table.replace_schema_metadata(metadata), file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path / part.name)

    def finish(self) -> Totals:
        """Counts the rows of all parts and marks the folder complete.

        Raises:
            UserError: A part is missing or has another number of rows, or the folder has other Parquet files.
        """
        metadata = [pq.read_metadata(self._check_part(part)) for part in self.parts]
        totals = Totals(
            rows_in=sum(part.rows for part in self.parts),
            rows_out=sum(entry.num_rows for entry in metadata),
            unknown_items=sum(int(entry.metadata[_UNKNOWN_KEY]) for entry in metadata),
            fallback_rows=sum(int(entry.metadata[_FALLBACK_KEY]) for entry in metadata),
            llm_rows=sum(int(entry.metadata[_LLM_KEY]) for entry in metadata),
            parts=len(metadata),
        )
        present = {path.name for path in self.path.glob("*.parquet")}
        if unexpected := sorted(present - {part.name for part in self.parts}):
            raise UserError(
                f"{self.path / unexpected[0]} is not a part of this scoring job; move it elsewhere and run again"
            )
        if not self.is_complete():
            self._write_json(SUCCESS_NAME, vars(totals))
        return totals

    def _check_part(self, part: Part) -> Path:
        path = self.path / part.name
        try:
            rows = pq.read_metadata(path).num_rows
        except (pa.ArrowInvalid, OSError):
            rows = -1
        if rows != part.rows:
            what = "is not readable" if rows < 0 else f"has {rows} rows, not {part.rows}"
            raise UserError(f"{path} {what}; delete it and run the same command again")
        return path

    def _check_same_job(self, manifest: Path) -> None:
        try:
            before = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        if before.get("format") != FORMAT:
            raise UserError(f"{manifest} does not belong to a scoring job; give another --output")
        if (version := before.get("version")) != FORMAT_VERSION:
            raise UserError(
                f"--output {self.path} has format version {version}, this version of llmgr_rec writes "
                f"{FORMAT_VERSION}; give another --output"
            )
        now = json.loads(json.dumps(self._manifest))
        for key in now:
            if before.get(key) != now[key]:
                raise UserError(
                    f"--output {self.path} has scores of another job, which differs in "
                    f"{_difference(key, before.get(key), now[key])}; "
                    "repeat the command that made it, or give another folder"
                )

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        partial = self.path / f".{name}.tmp"
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.path / name)


def _difference(key: str, before: Any, now: Any) -> str:
    """Describes a difference between two jobs: a value with its old and new state, or else the key of the manifest."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                return f"{key} ({name} was {before.get(name)}, is {now.get(name)})"
    return key
