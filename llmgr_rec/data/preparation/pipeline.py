"""The steps of prepare in order. The data set folder appears only when it is complete."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from llmgr_rec.cache import cache_folder
from llmgr_rec.cli import progress
from llmgr_rec.data.dataset import Manifest, load_manifest
from llmgr_rec.data.preparation import filters, load, phases, sessionize
from llmgr_rec.data.preparation.database import Database
from llmgr_rec.data.preparation.domain_inputs import paths_by_domain
from llmgr_rec.data.preparation.duckdb_database import DuckDBDatabase
from llmgr_rec.data.preparation.duplicates import (
    count_duplicates,
    drop_duplicates,
    merge_consecutive_repeats,
    naming_duplicates,
)
from llmgr_rec.data.preparation.hold_out import HeldOutFilter, choose_held_out
from llmgr_rec.data.preparation.items import catalog_hash, write_items
from llmgr_rec.data.preparation.parts import PartWriter, describe_file
from llmgr_rec.data.preparation.reuse import cached_data_set
from llmgr_rec.data.preparation.rows import INPUT_ORDER, SHUFFLED, RowBuilder, stream_blocks
from llmgr_rec.data.preparation.settings import PrepareSettings, check_settings
from llmgr_rec.data.preparation.source import Source
from llmgr_rec.data.repeats import decide_repeats
from llmgr_rec.data.schema import DOMAIN_SEPARATOR, ITEMS_NAME, MANIFEST_NAME, SPLITS, sessions_schema
from llmgr_rec.data.words import WORD_RULE
from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_folder, scratch_folder
from llmgr_rec.first_and_last_line import print_start, threads_in_use
from llmgr_rec.remote_path import RemotePath, as_path
from llmgr_rec.result_cache import files_below, recorded_messages

if TYPE_CHECKING:
    from pyspark.sql import SparkSession
    from tqdm import tqdm


def prepare_dataset(settings: PrepareSettings, spark: "SparkSession | None" = None) -> Manifest:
    """Makes a data set from raw logs, or takes that of an earlier run with the same files and settings.

    Args:
        settings: Settings of this run.
        spark: Running Spark session that does the work, as with `engine` spark; it is left running. None takes what
            `engine` says.

    Returns:
        The manifest of the data set.

    Raises:
        UserError: The input or the settings are invalid. Nothing is left on disk.
    """
    if spark is not None:
        settings = replace(settings, engine="spark")
    check_settings(settings)
    clicks, items = load.open_inputs(settings)
    reads = [settings.interactions, settings.sessions, settings.items]
    print_start("prepare", reads, settings.output, _describe_engine(settings))
    output = as_path(settings.output).resolve()
    # What takes a cluster, or is read from remote storage without a copy, is too large for one.
    is_here = not any(isinstance(file, RemotePath) for source in (clicks, items) if source for file in source.files)
    cached = cached_data_set(settings, clicks, items) if settings.engine == "duckdb" and is_here else None
    with atomic_folder(output, MANIFEST_NAME) as draft, recorded_messages(__package__) as messages:
        if cached and cached.take(draft):
            return load_manifest(draft)
        beside = cache_folder() / "remote" if isinstance(output, RemotePath) else output.parent
        temporary = Path(settings.temp_folder or beside).absolute() / output.name
        with scratch_folder(temporary) as scratch:
            database = _open_database(scratch, settings, spark)
            try:
                manifest = _run_steps(draft, database, settings, clicks, items)
            finally:
                database.close()
        if cached:
            cached.keep(files_below(draft), messages)
    return manifest


def _describe_engine(settings: PrepareSettings) -> str:
    if settings.engine == "spark":
        return f"Spark{f' of {settings.spark_master}' if settings.spark_master else ''}"
    return f"DuckDB, {threads_in_use(settings.threads)}, {settings.memory_gb:g} GiB of memory"


def _open_database(scratch: Path, settings: PrepareSettings, spark: "SparkSession | None") -> Database:
    if settings.engine == "duckdb":
        return DuckDBDatabase(scratch, settings.memory_gb, settings.threads)
    from llmgr_rec.data.preparation.spark_database import SparkDatabase

    return SparkDatabase(scratch, settings.memory_gb, settings.threads, settings.spark_master, spark)


def _run_steps(
    draft: Path, database: Database, settings: PrepareSettings, clicks: Source, items: Source | None
) -> Manifest:
    """Runs all steps; each advances the progress bar by one."""
    with progress(6, "prepare", "step") as bar:
        bar.set_description("prepare: read items and clicks")
        with database.user_errors(f"reading {settings.items}"):
            load.load_items(database, items, clicks)
        with database.user_errors(f"reading {settings.interactions or settings.sessions}"):
            read = (load.load_interactions if settings.interactions else load.load_sessions)(database, clicks, settings)
        bar.update()
        bar.set_description("prepare: k-core")
        with database.user_errors("preparing"):
            cut = sessionize.cut_sessions(database, clicks, settings) if settings.session_gap else {}
            duplicates = _find_duplicates(database, settings)
            with naming_duplicates(duplicates if settings.duplicates == "drop" else 0, read):
                before = filters.count_clicked(database)
                num_clicks = {"read": read, "duplicates": duplicates, **_filter(database, settings)}
                filtered = {
                    "before": before,
                    "after": filters.count_clicked(database),
                    "item_file": {"items": int(database.value("SELECT count(*) FROM items"))},
                }
                bar.update()
                bar.set_description("prepare: split")
                cuts = phases.assign_phases(database, settings)
                num_items = filters.number_items(database, settings.keep_unseen_items)
                bar.update()
                manifest = _write_files(draft, database, settings, clicks, num_items, bar)
            described = {"interactions" if settings.interactions else "sessions": clicks, "items": items}
            inputs = {option: found.description for option, found in described.items() if found and found.description}
            domains = _count_domains(database, settings) if clicks.domains else {}
            manifest = replace(
                manifest,
                domains=domains,
                cuts=cuts,
                num_clicks=num_clicks,
                filtered=filtered,
                inputs=inputs,
                session_gap=cut,
            )
            (draft / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _find_duplicates(database: Database, settings: PrepareSettings) -> int:
    """Number of duplicate clicks, which are dropped unless the settings keep them."""
    # The clicks of a row of sessions share one time, so there equal clicks are no duplicates.
    if not settings.interactions:
        return 0
    return (drop_duplicates if settings.duplicates == "drop" else count_duplicates)(database)


def _filter(database: Database, settings: PrepareSettings) -> dict[str, int]:
    """Merges consecutive repeats, applies the k-core filter, and returns the numbers of merged and remaining clicks."""
    merged = 0
    minimums = _core_minimums(settings)
    kept = filters.apply_core(database, *minimums)
    # The filter removes clicks between repeats, and merging removes clicks that the filter counts.
    while settings.consecutive_repeats == "merge" and (found := merge_consecutive_repeats(database)):
        merged += found
        kept = filters.apply_core(database, *minimums)
    filters.drop_users_without_clicks(database)
    return {"consecutive_repeats": merged, "kept": kept}


def _core_minimums(settings: PrepareSettings) -> tuple[int, int]:
    """Fewest clicks of an item and of a session that the filter keeps."""
    per_item, per_session = settings.min_interactions, settings.min_session_length
    return per_item, per_item if per_session is None else per_session


def _write_files(
    draft: Path,
    database: Database,
    settings: PrepareSettings,
    clicks: Source,
    num_items: int,
    bar: "tqdm[Any]",
) -> Manifest:
    digest = catalog_hash(database)
    writers = {split: PartWriter(draft / split, sessions_schema(digest)) for split in SPLITS}
    held_out_V = choose_held_out(database, num_items, settings.hold_out_items, settings.hold_out_seed)
    builder = RowBuilder(settings, held_out_V)
    for order, splits in ((SHUFFLED, ("train",)), (INPUT_ORDER, ("valid", "test"))):
        bar.set_description(f"prepare: write {' and '.join(splits)}")
        for block in stream_blocks(database, order):
            builder.write(block, {split: writers[split] for split in splits})
        for split in splits:
            writers[split].close()
        bar.update()
    _check_not_empty(writers, settings)
    bar.set_description("prepare: write items")
    id_type = pa.string() if load.item_id_type(clicks) == "string" else pa.int64()
    features, has_text = write_items(
        database, draft / ITEMS_NAME, id_type, builder.train_count_V, held_out_V, bool(clicks.domains)
    )
    bar.update()
    return Manifest(
        num_items=num_items,
        num_sessions={split: writer.num_rows for split, writer in writers.items()},
        num_examples={
            split: writer.num_clicks if split in settings.augmented_splits else writer.num_rows
            for split, writer in writers.items()
        },
        split=settings.split,
        max_length=settings.max_length,
        long_sessions=settings.long_sessions,
        min_interactions=settings.min_interactions,
        prefix_augmentation=settings.augmented_splits,
        features=features,
        word_rule=WORD_RULE,
        has_text=has_text,
        catalog_hash=digest,
        held_out=_held_out_counts(settings, builder.held_out_filter),
        duplicates=settings.duplicates,
        consecutive_repeats=settings.consecutive_repeats,
        repeats=decide_repeats(settings.repeats, builder.repeat_counter.counts),
        repeats_option=settings.repeats,
        repeat_counts=builder.repeat_counter.counts,
        click_use=builder.click_use.counts,
        files={str(path.relative_to(draft)): describe_file(path) for path in sorted(draft.rglob("*.parquet"))},
    )


def _count_domains(database: Database, settings: PrepareSettings) -> dict[str, dict[str, int]]:
    """Numbers of items and of users or sessions by domain, after the filters; 0 where these leave nothing of one."""
    paths = paths_by_domain(str(settings.interactions or settings.sessions), "interactions")
    counts = {name: {"items": 0, "sessions": 0} for name in paths}
    relations = {
        "items": "SELECT item_id AS id FROM catalog JOIN items USING (key)",
        "sessions": "SELECT name AS id FROM users",
    }
    for what, ids in relations.items():
        domain = f"split_part(id, '{DOMAIN_SEPARATOR}', 1)"
        for name, count in database.run(f"SELECT {domain} AS name, count(*) FROM ({ids}) GROUP BY 1 ORDER BY 1"):
            counts[name][what] = int(count)
    return counts


def _held_out_counts(settings: PrepareSettings, held_out_filter: HeldOutFilter) -> dict[str, float]:
    if not settings.hold_out_items:
        return {}
    return {
        "share": settings.hold_out_items,
        "seed": settings.hold_out_seed,
        "items": int(held_out_filter.held_out_V.sum()),
        "clicks": held_out_filter.clicks,
        "sessions": held_out_filter.sessions,
    }


def _check_not_empty(writers: dict[str, PartWriter], settings: PrepareSettings) -> None:
    """Raises a `UserError` if a split has no rows, except for a validation split of share 0."""
    required = [
        split for split in SPLITS if split != "valid" or settings.split == "leave_one_out" or settings.valid_share
    ]
    for split in required:
        if writers[split].num_rows == 0:
            advice = ""
            if split == "train" and settings.split == "leave_one_out":
                advice = "the last two clicks of each session are held out, so sessions of three train nothing; "
            advice += "lower --hold_out_items, or " if settings.hold_out_items and split == "train" else ""
            advice += "give a longer --session_gap, or " if settings.session_gap else ""
            advice += "lower --min_interactions, or " if max(_core_minimums(settings)) > 1 else ""
            raise UserError(
                f"--split {settings.split} gives no {split} rows: no session has a {split} click with earlier clicks "
                f"that may be its history; {advice}use another --split or other shares"
            )
