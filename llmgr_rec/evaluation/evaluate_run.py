"""Evaluates the models of a training run and the baselines, and writes metrics.json."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmgr_rec.baselines.blend import Blend
from llmgr_rec.baselines.builders import DEFAULT_BASELINES, baseline_builder, build_baseline, check_baselines
from llmgr_rec.baselines.in_domains import in_domains
from llmgr_rec.bounds import check_options
from llmgr_rec.config import RANKING_BOUNDS, Config, Device, Domains, TableDType
from llmgr_rec.config_file import load_config
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.repeats import RepeatsOption
from llmgr_rec.distributed.process_group import World, describe_ranks, process_group
from llmgr_rec.distributed.ranking_threads import ranking_runtime
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.beyond_accuracy import BeyondAccuracy, ItemProperties
from llmgr_rec.evaluation.comparison import by_domain, by_length, compare_models
from llmgr_rec.evaluation.exclusion import RankingRule, rule_of_bundles
from llmgr_rec.evaluation.metrics import BY_LENGTH
from llmgr_rec.evaluation.protocol import Measures, evaluate_baseline, evaluate_model
from llmgr_rec.evaluation.rank_collector import RankCollector, TargetRanks
from llmgr_rec.evaluation.results import (
    BY_DOMAIN,
    CUTOFFS,
    K,
    check_cutoffs,
    in_table_order,
    refuse_foreign_output,
    write_metrics,
)
from llmgr_rec.evaluation.session_ranks import Sessions, ranks_path, refuse_foreign_ranks, write_ranks
from llmgr_rec.first_and_last_line import print_start
from llmgr_rec.storage.bundle import check_bundle_code, load_bundle
from llmgr_rec.storage.bundle_index import (
    STAGES_OF_MODEL,
    bundle_hash,
    check_trained_on,
    find_bundle,
    read_config,
    read_index,
)
from llmgr_rec.training.freed_memory import keep_freed_memory
from llmgr_rec.versions import own_version


@dataclass(frozen=True)
class EvaluationRequest:
    """Arguments of an evaluation.

    Args:
        run: Run folder written by train.
        dataset: Folder written by prepare.
        split: `valid` or `test`.
        output: Metrics file to write.
        models: Names of models and baselines; None takes the default baselines and all trained models of the run.
        repeats: Whether lists may contain items that the session has clicked; auto takes what the bundles record.
        max_length: Number of newest clicks of a session that are shown; None takes what the bundles record.
        batch_size: Sessions per batch; None takes the run's setting, twice as many without a language model.
        device: Device of the models; None takes the run's setting.
        cutoffs: Cutoffs of the metrics; 20 is added to them.
        domains: Which items a list may have, where the data set has several domains.
        threads: CPU threads of each rank; None takes as many as the work is worth, see `ranking_runtime`.
        allow_code: Packages from which bundles may import their encoder or head.
        table_dtype: Number format of the embedding tables in memory; None takes that of each bundle.
    """

    run: Path
    dataset: Path
    split: str
    output: Path
    models: list[str] | None = None
    repeats: RepeatsOption = "auto"
    max_length: int | None = None
    batch_size: int | None = None
    device: Device | None = None
    cutoffs: Sequence[int] = CUTOFFS
    domains: Domains = "own"
    threads: int | None = None
    allow_code: Sequence[str] = ()
    table_dtype: TableDType | None = None


def evaluate_run(request: EvaluationRequest) -> dict[str, Any]:
    """Evaluates models and baselines, and writes the metrics file.

    Args:
        request: Arguments of the evaluation.

    Returns:
        The content of the metrics file.

    Raises:
        UserError: An argument, the run or the data set is not usable; raised on every rank before the process group
            starts.
    """
    dataset = Dataset(request.dataset)
    catalog = Catalog.of(dataset)
    bundles = _bundles(request, dataset)
    names = _in_order(request.models or [*DEFAULT_BASELINES, *bundles])
    for name in names:
        if name not in bundles:
            baseline_builder(name, "--models")
    check_baselines(names, catalog)
    config = _config(request)
    indexes = {name: read_index(bundle) for name, bundle in bundles.items()}
    rule = rule_of_bundles(indexes, dataset.manifest, request.repeats, request.max_length, request.domains)
    domains = catalog.domains if rule.domains == "own" else None
    cutoffs = sorted({*check_cutoffs(request.cutoffs), K})
    refuse_foreign_output(request.output)
    refuse_foreign_ranks(ranks_path(request.output))
    reads = [request.run, request.dataset]
    encodes_texts = any(bundle.name != "sbr" for bundle in bundles.values())
    runtime = ranking_runtime(config, request.threads, catalog.num_items, encodes_texts, request.batch_size)
    print_start("evaluate", reads, request.output, describe_ranks(runtime))
    keep_freed_memory()
    with process_group(runtime) as world:
        items, results = ItemProperties(catalog), dict[str, dict[str, Any]]()
        blends: dict[str, dict[str, float]] = {}
        ranks: dict[str, TargetRanks] = {}
        for name in names:
            collector = RankCollector()
            measures = Measures(cutoffs, collector, BeyondAccuracy(items))
            if name not in bundles:
                baseline = in_domains(build_baseline(name, dataset, catalog), domains)
                results[name] = evaluate_baseline(baseline, dataset, request.split, catalog, world, rule, measures)
            else:
                results[name], blend = _evaluate_bundle(bundles[name], request, dataset, catalog, world, rule, measures)
                blends |= {name: dict(blend.weights)} if blend else {}
            ranks[name] = collector.gather(world)
    content = {
        request.split: results,
        "count": next(iter(results.values()))["count"],
        "num_items": catalog.num_items,
        "split": request.split,
        "dataset": dataset.manifest.catalog_hash,
        "dataset_path": str(request.dataset.resolve()),
        "protocol": f"{rule.ranked_items(catalog.domains is not None)}, ties by lower index, {rule}",
        **rule.record(catalog.domains is not None),
        "cutoffs": list(cutoffs),
        "run": str(request.run),
        "stages": {name: bundle.name for name, bundle in bundles.items() if name in results},
        "bundles": {name: bundle_hash(bundle) for name, bundle in bundles.items() if name in results},
        "table_dtypes": {name: request.table_dtype or indexes[name].table_dtype for name in bundles if name in results},
        "blends": blends,
        "sessions": dataset.manifest.split_hash(request.split),
        "evaluated": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": own_version(),
        **compare_models(ranks, [name for name in names if name in bundles]),
    }
    if world.rank == 0:
        _write(request, content, ranks, Sessions.of(dataset, request.split, catalog, rule))
    return content


def _write(
    request: EvaluationRequest, content: dict[str, Any], ranks: Mapping[str, TargetRanks], sessions: Sessions
) -> None:
    """Writes the target ranks, then the metrics file with their checksum, to which this adds results by length."""
    for name, metrics in content[request.split].items():
        metrics[BY_LENGTH] = by_length(ranks[name], sessions)
        if sessions.domains:
            metrics[BY_DOMAIN] = by_domain(ranks[name], sessions)
    content["ranks_checksum"] = write_ranks(ranks_path(request.output), ranks, sessions)
    write_metrics(request.output, content)


def _evaluate_bundle(
    bundle: Path,
    request: EvaluationRequest,
    dataset: Dataset,
    catalog: Catalog,
    world: World,
    rule: RankingRule,
    measures: Measures,
) -> tuple[dict[str, Any], Blend | None]:
    """The metrics of a bundle, and its blend."""
    loaded = load_bundle(bundle, world, allow_code=request.allow_code, table_dtype=request.table_dtype)
    ranking = loaded.ranking(request.batch_size or loaded.evaluation_batch_size, keeps_tables=False)
    metrics = evaluate_model(ranking, dataset, request.split, world, catalog.train_count_V, rule, measures)
    return metrics, loaded.blend


def _bundles(request: EvaluationRequest, dataset: Dataset) -> dict[str, Path]:
    """Bundles to evaluate by model name, checked to be trained on the data set."""
    if not request.run.is_dir():
        raise UserError(f"--run {request.run} does not exist; give the --output folder of llmgr_rec.train")
    complete = {name: bundle for name in STAGES_OF_MODEL if (bundle := find_bundle(request.run / "export", name))}
    requested = [name for name in request.models or STAGES_OF_MODEL if name in STAGES_OF_MODEL]
    if request.models is None and not complete:
        raise UserError(
            f"--run {request.run} has no complete export; train a stage to its end (llmgr_rec.train --resume), "
            "or pass --models popularity,item_knn"
        )
    if request.models is not None and (missing := [name for name in requested if name not in complete]):
        stages = " or ".join(STAGES_OF_MODEL[missing[0]])
        raise UserError(
            f"--run {request.run} has no complete export of {missing[0]} (stage {stages}); train it first, "
            f"or remove {missing[0]} from --models"
        )
    bundles = {name: complete[name] for name in requested if name in complete}
    for bundle in bundles.values():
        check_trained_on(bundle, dataset)
        check_bundle_code(read_config(bundle), bundle, request.allow_code)
    return bundles


def _in_order(names: Iterable[str]) -> list[str]:
    """Distinct names: those of `MODEL_NAMES` in their order, then import paths."""
    return in_table_order(dict.fromkeys(names))


def _config(request: EvaluationRequest) -> Config:
    file = request.run / "config.yaml"
    config = load_config(file) if file.is_file() else Config()
    if request.device:
        config.runtime.device = request.device
    check_options({name: getattr(request, name) for name in RANKING_BOUNDS}, RANKING_BOUNDS)
    return config
