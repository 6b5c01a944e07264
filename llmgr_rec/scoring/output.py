"""Output folder of a scoring job: a manifest of the job, the finished parts, and a marker file of completeness.

Every file gets its name when its content is on disk, in the order manifest, parts, marker. So a job that is killed at
any moment resumes with the missing parts, and a folder with the marker has all of them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_write, fsync, require_writable
from llmgr_rec.folder_lock import LOCK_NAME, FolderLock
from llmgr_rec.index_files import read_json
from llmgr_rec.remote_path import parquet_source
from llmgr_rec.scoring.input import MANIFEST_NAME, SESSION_ID, Part

SUCCESS_NAME = "_SUCCESS"
FORMAT = "llmgr_rec.scores"
FORMAT_VERSION = 2
# Columns of the output that are not in the input; titles on request.
OUTPUT_COLUMNS = ("item_ids", "titles", "scores", "fallback")

# Parquet schema metadata with the counts of a part.
_UNKNOWN_KEY = b"llmgr_rec.unknown_items"
_REPEATS_KEY = b"llmgr_rec.consecutive_repeats"
_FALLBACK_KEY = b"llmgr_rec.fallback_rows"
_LLM_KEY = b"llmgr_rec.llm_rows"


@dataclass(frozen=True)
class Totals:
    """Counts of a complete job.

    Args:
        rows_in: Rows of the input.
        rows_out: Rows of all parts.
        unknown_items: Clicks on unknown items, which were skipped.
        consecutive_repeats: Clicks on the item clicked just before, which were merged as in the training data.
        fallback_rows: Sessions without a known item, which got the most popular items.
        llm_rows: Sessions that a language model encoded.
        parts: Output files.
    """

    rows_in: int
    rows_out: int
    unknown_items: int
    consecutive_repeats: int
    fallback_rows: int
    llm_rows: int
    parts: int


class ScoreFolder:
    """Output of one scoring job. One process at a time may have it open.

    Args:
        path: The folder, new or of an interrupted job.
        job: All that the output depends on (input, settings, model), as JSON values.
        parts: All parts of the job.
    """

    def __init__(self, path: Path, job: Mapping[str, Any], parts: list[Part]) -> None:
        self.path = path
        self.parts = parts
        self._lock = FolderLock(path, "scoring")
        listed = [
            {"name": part.name, "file": part.file.name, "first_row": part.first_row, "rows": part.rows}
            for part in parts
        ]
        self._manifest = {"format": FORMAT, "version": FORMAT_VERSION, **job, "parts": listed}

    def open(self) -> None:
        """Creates and locks the folder, or checks that an existing one belongs to the same job; see `close`.

        Raises:
            UserError: The folder is not a scoring output, belongs to another job, has a damaged part, or another
                process has it open.
        """
        require_writable(self.path)
        self._check_not_foreign()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            self._continue()
        except BaseException:
            self.close()
            raise

    def join(self) -> None:
        """After another rank has opened the folder: lets this one write while that one has the lock."""
        self._lock.join()

    def close(self) -> None:
        """Unlocks the folder; without effect if it is not open."""
        self._lock.release()

    def is_done(self, part: Part) -> bool:
        """Whether a part is finished."""
        return (self.path / part.name).is_file()

    def is_complete(self) -> bool:
        """Whether `finish` has marked the folder complete."""
        return (self.path / SUCCESS_NAME).is_file()

    def write(
        self,
        part: Part,
        table: pa.Table,
        unknown_items: int,
        fallback_rows: int,
        llm_rows: int,
        consecutive_repeats: int = 0,
    ) -> None:
        """Writes a part.

        Args:
            part: The part.
            table: Rows of the part.
            unknown_items: Clicks on unknown items in its sessions.
            fallback_rows: Sessions that got the most popular items.
            llm_rows: Sessions that a language model encoded.
            consecutive_repeats: Clicks on the item clicked just before, which were merged.
        """
        counts = {
            _UNKNOWN_KEY: unknown_items,
            _REPEATS_KEY: consecutive_repeats,
            _FALLBACK_KEY: fallback_rows,
            _LLM_KEY: llm_rows,
        }
        metadata = {key: str(count).encode() for key, count in counts.items()}
        with atomic_write(self.path / part.name) as partial:
            pq.write_table(
                table.replace_schema_metadata(metadata),
                partial,
                compression="zstd",
                use_dictionary=_repeating_columns(table.schema),
                write_page_checksum=True,
            )

    def finish(self) -> Totals:
        """Counts the rows of all parts and marks the folder complete.

        Raises:
            UserError: A part is missing or has another number of rows, or the folder has other Parquet files.
        """
        metadata = [pq.read_metadata(parquet_source(self._check_part(part))) for part in self.parts]
        totals = Totals(
            rows_in=sum(part.rows for part in self.parts),
            rows_out=sum(entry.num_rows for entry in metadata),
            unknown_items=sum(int(entry.metadata[_UNKNOWN_KEY]) for entry in metadata),
            consecutive_repeats=sum(int(entry.metadata[_REPEATS_KEY]) for entry in metadata),
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

    def _check_not_foreign(self) -> None:
        if not self.path.is_dir() or (self.path / MANIFEST_NAME).is_file():
            return
        # A job that was killed before it had a manifest leaves these.
        if set(self.path.iterdir()) - {self.path / LOCK_NAME, *self._temporaries()}:
            raise UserError(f"--output {self.path} is not empty and not a scoring output; give another folder")

    def _continue(self) -> None:
        """Brings the locked folder to a state in which parts are missing, but nothing is wrong."""
        manifest = self.path / MANIFEST_NAME
        if manifest.is_file():
            self._check_same_job(manifest)
        for temporary in self._temporaries():
            temporary.unlink(missing_ok=True)
        if not manifest.is_file():
            self._write_json(MANIFEST_NAME, self._manifest)
        for part in self.parts:
            if self.is_done(part):
                self._check_part(part)
        if self.is_complete() and not all(self.is_done(part) for part in self.parts):
            # A part was deleted, to be scored again.
            (self.path / SUCCESS_NAME).unlink()
            fsync(self.path)

    def _temporaries(self) -> list[Path]:
        """Temporary files, of dead processes where the folder is locked; the second pattern is of version 0.2."""
        return [*self.path.glob(".tmp-*"), *self.path.glob(".*.tmp")]

    def _check_part(self, part: Part) -> Path:
        path = self.path / part.name
        try:
            rows = pq.read_metadata(parquet_source(path)).num_rows
        except (pa.ArrowInvalid, OSError):
            rows = -1
        if rows != part.rows:
            what = "is not readable" if rows < 0 else f"has {rows} rows, not {part.rows}"
            raise UserError(f"{path} {what}; delete it and run the same command again")
        return path

    def _check_same_job(self, manifest: Path) -> None:
        try:
            before = read_json(manifest)
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
        with atomic_write(self.path / name) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _repeating_columns(schema: pa.Schema) -> list[str]:
    """Parquet paths of the columns whose values repeat.

    Session ids and scores hardly do: a dictionary of them takes longer to make than to write them without one.
    """
    paths = []
    for column in schema:
        if column.name in (SESSION_ID, "scores"):
            continue
        path, kind = column.name, column.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind):
            path, kind = f"{path}.list.element", kind.value_type
        paths.append(path)
    return paths


def _difference(key: str, before: Any, now: Any) -> str:
    """Describes a difference between two jobs: a value with its old and new state, or else the key of the manifest."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                return f"{key} ({name} was {before.get(name)}, is {now.get(name)})"
    return key
