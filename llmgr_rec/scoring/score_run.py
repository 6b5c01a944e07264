"""Runs a scoring job: preflight, scoring of the missing parts, completion of the output."""

import logging
import os
from contextlib import closing
from dataclasses import asdict
from typing import Any

from llmgr_rec.cli import progress
from llmgr_rec.distributed.process_group import (
    World,
    barrier,
    describe_ranks,
    long_timeout_group,
    process_group,
    run_on_rank0,
)
from llmgr_rec.distributed.ranking_threads import ranking_runtime
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.exclusion import ranking_rule
from llmgr_rec.first_and_last_line import print_start
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.prepare_for_inference import prepare_for_inference
from llmgr_rec.scoring.input import Part, SessionFiles
from llmgr_rec.scoring.output import ScoreFolder, Totals
from llmgr_rec.scoring.score_checks import ScoreRequest, preflight
from llmgr_rec.scoring.scorer import LIST_ITEM_BYTES, Scorer, ScoreSettings
from llmgr_rec.storage.bundle import BundleFiles, load_model
from llmgr_rec.storage.bundle_index import bundle_hash

__all__ = ["ScoreRequest", "score_run"]

logger = logging.getLogger(__name__)


def score_run(request: ScoreRequest) -> Totals:
    """Runs a scoring job, or resumes an interrupted one.

    Returns:
        Counts of the complete output.

    Raises:
        UserError: The request or the input is invalid; raised on all ranks before the first collective operation and
            before anything is written.
    """
    bundle = preflight(request)
    files = SessionFiles(request.input, request.passed_columns, bundle.catalog, request.unknown_items)
    _check_rows(files)
    settings = _settings(request, bundle)
    parts = files.parts(request.part_rows)
    _check_list_size(request, bundle, parts)
    folder = ScoreFolder(request.output, _job(request, bundle, files, settings), parts)
    runtime = ranking_runtime(
        bundle.config,
        request.threads,
        bundle.catalog.num_items,
        has_language_model=bundle.index.stage != "sbr",
        batch_size=request.batch_size,
    )
    with process_group(runtime, request.device) as world, closing(folder):
        missing: list[Part] = run_on_rank0(world, lambda: _open(folder))
        folder.join()
        print_start("score", [request.input, bundle.path], request.output, describe_ranks(runtime, request.device))
        if request.input.is_dir():
            logger.info("--input %s: %s", request.input, files.description)
        # A rank may end its parts long before the others.
        with long_timeout_group(world) as group:
            if missing:
                _score(_load_scorer(request, bundle, settings, world), files, missing, folder)
            barrier(world, group)
        return run_on_rank0(world, folder.finish)


def _settings(request: ScoreRequest, bundle: BundleFiles) -> ScoreSettings:
    return ScoreSettings(
        k=request.k,
        rule=ranking_rule(bundle.index, request.repeats, request.max_length, request.domains),
        consecutive_repeats=bundle.index.consecutive_repeats,
        batch_size=request.batch_size or bundle.config.runtime.eval_batch_size,
        routing=request.routing,
        titles=request.titles,
    )


def _job(request: ScoreRequest, bundle: BundleFiles, files: SessionFiles, settings: ScoreSettings) -> dict[str, Any]:
    """All that the output depends on. Output folders of jobs that differ in it are not reused."""
    stored = bundle.index.table_dtype
    return {
        "input": {file.name: {"rows": file.rows, "sha256": file.sha256()} for file in files.files},
        "settings": {
            **_flat(settings, bundle.catalog.domains is not None),
            # Without it, the settings are those of versions that had only float32, whose jobs can be continued.
            **({"table_dtype": table_dtype} if (table_dtype := request.table_dtype or stored) != stored else {}),
            "llm_dtype": request.llm_dtype or bundle.config.llm.dtype,
            "llm_layers": request.llm_layers,
            "columns": request.passed_columns,
            "unknown_items": request.unknown_items,
            "part_rows": request.part_rows,
        },
        "model": {
            "stage": bundle.index.stage,
            "sha256": bundle_hash(bundle.path, bundle.index),
            "catalog": bundle.catalog.hash,
        },
    }


def _flat(settings: ScoreSettings, has_domains: bool) -> dict[str, Any]:
    values = {**asdict(settings), "rule": settings.rule.record(has_domains)}
    # Without titles, the settings are those of versions that had none, whose jobs can be continued.
    if not values["titles"]:
        del values["titles"]
    return {**values.pop("rule"), **values}


def _load_scorer(request: ScoreRequest, bundle: BundleFiles, settings: ScoreSettings, world: World) -> Scorer:
    """Loads the model. A collective: all ranks must call it."""
    loaded = load_model(bundle, world, request.llm_dtype, table_dtype=request.table_dtype)
    if isinstance(loaded.model, LLMGR):
        prepare_for_inference(loaded.model.language_model, request.llm_layers)
    return Scorer(loaded, settings, world)


def _score(scorer: Scorer, files: SessionFiles, missing: list[Part], folder: ScoreFolder) -> None:
    """Scores and writes the missing parts. All ranks must call it."""
    own = scorer.share(missing)
    done = files.rows - sum(part.rows for part in missing)
    bar = progress(done + sum(part.rows for part in own), "score", "session", initial=done)
    scorer.run(files, own, folder, bar.update)
    bar.close()


def _open(folder: ScoreFolder) -> list[Part]:
    """Opens the output folder and returns the missing parts."""
    folder.open()
    missing = [part for part in folder.parts if not folder.is_done(part)]
    if done := len(folder.parts) - len(missing):
        logger.info("%d of %d parts are finished already", done, len(folder.parts))
    return missing


def _check_rows(files: SessionFiles) -> None:
    bar = progress(files.rows, "check input", "session")
    files.check(bar.update)
    bar.close()


def _check_list_size(request: ScoreRequest, bundle: BundleFiles, parts: list[Part]) -> None:
    """Raises a `UserError` if the memory of this machine is smaller than the lists of a part."""
    rows, k = max(part.rows for part in parts), min(request.k, bundle.catalog.num_items)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (needed := rows * k * LIST_ITEM_BYTES) > memory:
        raise UserError(
            f"lists of {k:,} items (--k) for {rows:,} sessions of a part need {needed / 2**30:.0f} GiB of memory, this "
            f"machine has {memory / 2**30:.0f}; lower --part_rows or --k"
        )
