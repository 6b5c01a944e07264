"""The folder of a scoring job: what it is of, its finished parts, and the mark that it is complete.

A part has its name only once it is whole, so an interrupted job goes on with the parts that are missing.
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
# Columns that the output adds to those of the input.
OUTPUT_COLUMNS = ("item_ids", "scores", "fallback")

# Counts of a part, in its Parquet schema metadata.
_UNKNOWN_KEY = b"llmgr_rec.unknown_items"
_FALLBACK_KEY = b"llmgr_rec.fallback_rows"
_LLM_KEY = b"llmgr_rec.llm_rows"


@dataclass(frozen=True)
class Totals:
    """What a complete job has done.

    Args:
        rows_in: Rows of the input.
        rows_out: Rows of all parts.
        unknown_items: Clicks on unknown items, which were left out.
        fallback_rows: Sessions without a known click, which got the most popular items.
        llm_rows: Sessions that a language model has encoded.
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
        path: Folder to make or to go on with.
        job: What the output depends on: input fingerprint, settings, model. Plain JSON values.
        parts: All parts of the job.
    """

    def __init__(self, path: Path, job: Mapping[str, Any], parts: list[Part]) -> None:
        self.path = path
        self.parts = parts
        listed = [
            {"name": part.name, "file": part.file.name, "first_row": part.first_row, "rows": part.rows}
            for part in parts
        ]
        self._manifest = {"format": FORMAT, "version": 1, **job, "parts": listed}

    def open(self) -> None:
        """Makes the folder, or checks that the one there is of the same job.

        Raises:
            UserError: The folder belongs to something else, to another job, or holds a damaged part.
        """
        manifest = self.path / MANIFEST_NAME
        require_writable(self.path)
        if manifest.is_file():
            self._check_same_job(manifest)
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"--output {self.path} is not empty and is no scoring output; give another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink()
        if not manifest.is_file():
            self._write_json(MANIFEST_NAME, self._manifest)
        for part in self.parts:
            if self.is_done(part):
                self._check_part(part)

    def is_done(self, part: Part) -> bool:
        """Whether a part is there, which means whole."""
        return (self.path / part.name).is_file()

    def is_complete(self) -> bool:
        """Whether all parts are there and were counted."""
        return (self.path / SUCCESS_NAME).is_file()

    def write(self, part: Part, table: pa.Table, unknown_items: int, fallback_rows: int, llm_rows: int) -> None:
        """Writes a part; it appears under its name when it is whole.

        Args:
            part: Which part.
            table: Its rows.
            unknown_items: Clicks on unknown items in its sessions.
            fallback_rows: Sessions that got the fallback.
            llm_rows: Sessions that a language model has encoded.
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
            UserError: Rows are missing or too many.
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
        if strangers := sorted(present - {part.name for part in self.parts}):
            raise UserError(f"{self.path / strangers[0]} is no part of this scoring job; move it elsewhere, run again")
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
            raise UserError(f"{manifest} is not of a scoring job; give another --output")
        now = json.loads(json.dumps(self._manifest))
        for key in now:
            if before.get(key) != now[key]:
                raise UserError(
                    f"--output {self.path} holds scores of another job, which differs in "
                    f"{_difference(key, before.get(key), now[key])}; "
                    "repeat the command that made it, or give another folder"
                )

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        partial = self.path / f".{name}.tmp"
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.path / name)


def _difference(key: str, before: Any, now: Any) -> str:
    """Names what differs: a setting with both values, or the part of the job."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                return f"{key} ({name} was {before.get(name)}, is {now.get(name)})"
    return key
