"""Settings of prepare. Imports no third-party package, so that `--help` is fast."""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmgr_rec.bounds import Bounds, check_options
from llmgr_rec.data.preparation.domain_inputs import check_domains
from llmgr_rec.data.preparation.duration import nanoseconds_of
from llmgr_rec.data.repeats import LARGEST_MAX_LENGTH, ConsecutiveRepeats, RepeatsOption
from llmgr_rec.errors import UserError
from llmgr_rec.files import is_free, require_writable
from llmgr_rec.paths import LocalPath, StoragePath
from llmgr_rec.remote_path import RemotePath, as_path

_SHARE = Bounds(at_least=0, below=1)
_CLICKS = Bounds(at_least=0, at_most=2**31)
_BOUNDS = {
    "min_interactions": _CLICKS,
    "min_session_length": _CLICKS,
    "max_length": Bounds(at_least=1, at_most=LARGEST_MAX_LENGTH),
    "valid_share": _SHARE,
    "test_share": _SHARE,
    "hold_out_items": _SHARE,
    # DuckDB starts all threads at once.
    "threads": Bounds(at_least=0, at_most=1024),
    "memory_gb": Bounds(above=0, at_most=1e6),
}


@dataclass(frozen=True)
class PrepareSettings:
    """Input, filters, split and output of prepare.

    Args:
        output: Data set folder to write; must not exist or be empty.
        interactions: Parquet file or folder with user_id, item_id, timestamp. Give this or sessions. For one model of
            several domains, a file or folder of each by its name: beauty=F,films=G; see docs/domains.md.
        sessions: Parquet file or folder with session_id, items (list of item ids, oldest first) and, optionally,
            timestamp. Give this or interactions. By domain as interactions.
        items: Item catalog: a Parquet file or a folder of them, with item_id and any of title, category, brand,
            description. By domain as interactions. Default: the items of the clicks, without text. In folders, files at
            any depth are read, and dt=2026-11-01 in a path is a column.
        rename: Names of columns of the log or the sessions that have other ones: item=item_id,ts_ms=timestamp. A log
            without user_id may have session_id.
        rename_items: The same for the item file: sku=item_id,name=title.
        session_gap: Inactivity that ends a session of a user_id, such as 30min, 2h or 1d (s, min, h, d); default: all
            clicks of a user_id are one session. Needs interactions.
        time_unit: Unit of timestamps that are numbers since 1970; auto: by their size, if all are from 1990 to 2100.
            Used by session_gap, and to accept a column that seems to have several units.
        duplicates: Rows that are equal in user, item and time: drop all but the first, or keep them. Rows of sessions
            have no time per click, so nothing is dropped there.
        consecutive_repeats: Clicks in a row on the same item: keep them, or merge them into the first.
        repeats: Whether rankings may contain items that the session has clicked. auto excludes them if less than 5 % of
            the targets of each split are repeats.
        min_interactions: k of the iterative k-core filter: users and items with fewer interactions are dropped until
            all have at least k; 0 or 1 disables it.
        min_session_length: k for users (sessions), if it differs from k for items.
        max_length: Maximum length of a history in clicks; the newest clicks of a longer history are kept.
        long_sessions: How to treat a training history longer than max_length: split it into consecutive rows so that
            every click is predicted once, or keep the newest clicks in one row.
        split: leave_one_out (last click test, the one before validation), temporal (global points in time) or
            predefined.
        valid_share: Share of sessions for validation. temporal: sessions by their last click; predefined: the newest
            training sessions, if the input has no validation sessions. 0 for none.
        test_share: Share of sessions for test in the temporal split, by their last click.
        split_column: Column with train, valid or test for the predefined split; default: a column named split.
        split_prefix: Predefined split by the prefix of the user or session name (train_, valid_, test_); default:
            used if there is no split column.
        prefix_augmentation: Splits in which each prefix of a row is an example, with its next click as target.
        missing_items: How to treat interactions whose item is not in the catalog: stop, drop the interactions, or
            keep the item without text.
        keep_unseen_items: Keep catalog items without interactions.
        hold_out_items: Share of items held out of training, at least 0 and below 1. Their clicks are removed from the
            training sessions; validation and test sessions keep them, as history and as targets.
        hold_out_seed: Seed of the choice of held-out items, which depends on the seed and the item ids only.
        engine: duckdb works on this machine; spark needs pyspark and Java, and gives the same files.
        spark_master: Spark master, such as spark://host:7077; default: that of spark-submit, or this machine.
        memory_gb: Memory limit of DuckDB, in GiB; what exceeds it spills to disk. The process needs about 0.5 GiB more.
            With Spark, the memory of its driver.
        threads: DuckDB threads, or tasks of Spark on this machine; 0 for one per core.
        temp_folder: Folder for spilled data; default: next to the output. With Spark, all executors must reach it.
    """

    output: StoragePath
    interactions: StoragePath | None = None
    sessions: StoragePath | None = None
    items: StoragePath | None = None
    rename: str | None = None
    rename_items: str | None = None
    session_gap: str | None = None
    time_unit: Literal["auto", "seconds", "milliseconds", "microseconds", "nanoseconds"] = "auto"
    duplicates: Literal["drop", "keep"] = "drop"
    consecutive_repeats: ConsecutiveRepeats = "keep"
    repeats: RepeatsOption = "auto"
    min_interactions: int = 5
    min_session_length: int | None = None
    max_length: int = 50
    long_sessions: Literal["newest", "split"] = "split"
    split: Literal["leave_one_out", "temporal", "predefined"] = "leave_one_out"
    valid_share: float = 0.1
    test_share: float = 0.1
    split_column: str | None = None
    split_prefix: bool = False
    prefix_augmentation: Literal["train", "all", "none"] = "train"
    missing_items: Literal["error", "drop", "keep"] = "error"
    keep_unseen_items: bool = False
    hold_out_items: float = 0.0
    hold_out_seed: int = 0
    engine: Literal["duckdb", "spark"] = "duckdb"
    spark_master: str | None = None
    memory_gb: float = 1.0
    threads: int = 0
    temp_folder: LocalPath | None = None

    @property
    def augmented_splits(self) -> list[str]:
        """Splits in which each prefix of a row is an example."""
        return {"train": ["train"], "all": ["train", "valid", "test"], "none": []}[self.prefix_augmentation]

    @property
    def splits_of_several_rows(self) -> list[str]:
        """Splits in which a session longer than max_length becomes several rows."""
        return self.augmented_splits if self.long_sessions == "split" else []


def check_settings(settings: PrepareSettings) -> None:
    """Validates settings before any input is read.

    Args:
        settings: Parsed settings.

    Raises:
        UserError: A setting is invalid, or the output exists and is not empty.
    """
    check_options(vars(settings), _BOUNDS)
    if (settings.interactions is None) == (settings.sessions is None):
        raise UserError("give exactly one of --interactions and --sessions")
    option = "sessions" if settings.interactions is None else "interactions"
    check_domains(str(settings.interactions or settings.sessions), settings.items, option)
    _check_sessions(settings)
    _check_split(settings)
    _check_engine(settings)
    if settings.temp_folder:
        require_writable(Path(settings.temp_folder), "--temp_folder")
    # Not at the top, because it imports pyarrow, which --help does without.
    from llmgr_rec.data.schema import MANIFEST_NAME

    output = as_path(settings.output)
    require_writable(output if isinstance(output, RemotePath) else output.parent)
    if not is_free(output, MANIFEST_NAME):
        raise UserError(f"output {output} exists and is not an empty folder; give another --output or delete it")


def _check_sessions(settings: PrepareSettings) -> None:
    if settings.session_gap is None:
        return
    nanoseconds_of(settings.session_gap, "--session_gap")
    if settings.interactions is None:
        raise UserError("--session_gap cuts a log of --interactions; --sessions are sessions already, leave it out")


def _check_split(settings: PrepareSettings) -> None:
    shares = {"valid_share": settings.valid_share, "test_share": settings.test_share}
    if settings.split == "temporal" and not (settings.test_share > 0 and sum(shares.values()) < 1):
        raise UserError("--split temporal needs --test_share above 0 and --valid_share + --test_share below 1")
    if settings.split_column and settings.split_prefix:
        raise UserError("give --split_column or --split_prefix, not both")
    if settings.split != "predefined" and (settings.split_column or settings.split_prefix):
        raise UserError("--split_column and --split_prefix require --split predefined; add it or remove them")
    if settings.split == "leave_one_out" and settings.prefix_augmentation == "all":
        raise UserError(
            "--prefix_augmentation all would evaluate on training clicks with --split leave_one_out; "
            "use train or none, or a split by whole sessions (temporal, predefined)"
        )


def _check_engine(settings: PrepareSettings) -> None:
    if settings.engine != "spark":
        if settings.spark_master is not None:
            raise UserError("--spark_master needs --engine spark; add it, or leave out --spark_master")
        return
    for package in ("pyspark", "sqlglot"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--engine spark needs the package {package}, which is not installed: "
                "pip install 'pyspark>=4.2,<5' 'sqlglot>=30,<31'"
            )
    home = os.environ.get("JAVA_HOME")
    if shutil.which("java", path=f"{home}/bin" if home else None) is None:
        where = f"in JAVA_HOME={home}" if home else "on the PATH"
        raise UserError(
            f"--engine spark needs Java 17 or later, and there is no java {where}: "
            "apt install openjdk-17-jre-headless, or set JAVA_HOME"
        )
