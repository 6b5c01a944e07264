"""`python -m llmgr_rec.plan`: table sharding, memory and trained parameters of a run, before it starts.

    python -m llmgr_rec.plan --config paper --dataset DATASET --world_size 8
    python -m llmgr_rec.plan --num_items 100000000 --world_size 16 --tables.memory_per_rank_gb 64

Requires neither data nor several processes. If the tables do not fit, the exit code is 2 and the message says how to
fix it.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from llmgr_rec.bounds import Bounds, check_options
from llmgr_rec.cli import make_parser, run_cli
from llmgr_rec.config_file import add_config_arguments, parse_with_config
from llmgr_rec.errors import UserError
from llmgr_rec.first_and_last_line import print_result, print_start
from llmgr_rec.library_imports import command_imports
from llmgr_rec.paths import StoragePath
from llmgr_rec.remote_path import as_path

if TYPE_CHECKING:
    from llmgr_rec.config import StageName
    from llmgr_rec.training.memory_plan import CatalogSizes, StagePlan
    from llmgr_rec.training.rank_memory import RankMemory, Reading

GIB = 1024**3
# Option with the vocabulary size of each side feature.
_FEATURE_SIZES = {"category": "num_categories", "brand": "num_brands", "word": "num_words"}

_ROWS = Bounds(at_least=0, at_most=2**40)
_BOUNDS = {
    "num_items": Bounds(at_least=1, at_most=2**40),
    **dict.fromkeys(_FEATURE_SIZES.values(), _ROWS),
    "world_size": Bounds(at_least=1, at_most=65_536),
    "local_world_size": Bounds(at_least=1, at_most=1024),
    "num_interactions": Bounds(at_least=1, at_most=2**50),
    "examples_per_second": Bounds(above=0, at_most=1e12),
    "memory_per_rank_gb": Bounds(above=0, at_most=1e6),
}


def main(argv: Sequence[str]) -> None:
    """Parses arguments, plans all stages and prints the plan.

    Args:
        argv: Arguments of the command.

    Raises:
        UserError: An argument or setting is not usable, or the tables do not fit.
    """
    parser = make_parser("llmgr_rec.plan")
    parser.add_argument("--dataset", type=StoragePath, help="Folder written by llmgr_rec.prepare.")
    parser.add_argument("--num_items", type=int, help="Number of items, instead of --dataset.")
    parser.add_argument("--num_categories", type=int, default=0, help="Number of categories, with --num_items.")
    parser.add_argument("--num_brands", type=int, default=0, help="Number of brands, with --num_items.")
    parser.add_argument("--num_words", type=int, default=0, help="Number of distinct title words, with --num_items.")
    parser.add_argument("--world_size", type=int, default=1, help="Number of ranks.")
    parser.add_argument("--local_world_size", type=int, help="Ranks per machine; default: all, at most 8.")
    parser.add_argument(
        "--num_interactions", type=int, help="Number of training clicks, with --num_items; gives the numbers of steps."
    )
    parser.add_argument(
        "--examples_per_second", type=float, help="Measured rate of a training on all ranks; gives the time of a stage."
    )
    parser.add_argument(
        "--memory_per_rank_gb",
        type=float,
        help="Memory that a rank may use for everything; if less, the exit code is 2.",
    )
    add_config_arguments(parser)
    arguments, config = parse_with_config(parser, argv)
    check_options({name: arguments[name] for name in _BOUNDS}, _BOUNDS)
    if arguments.num_interactions and arguments.dataset:
        raise UserError("--num_interactions goes with --num_items; --dataset has the number of its clicks")
    local_size = arguments.local_world_size or min(arguments.world_size, 8)
    if local_size < 1 or arguments.world_size % local_size:
        raise UserError(
            f"--local_world_size {local_size} does not divide --world_size {arguments.world_size}; "
            "give the ranks per machine"
        )

    with command_imports():
        from llmgr_rec.data.dataset import Dataset
        from llmgr_rec.distributed.process_group import choose_device
        from llmgr_rec.training.memory_plan import Ranks, plan_memory
        from llmgr_rec.training.preflight import check_reranker_ranks
        from llmgr_rec.training.rank_memory import Reading, estimate_memory

    check_reranker_ranks(config, arguments.world_size)
    features = {name: getattr(arguments, option) for name, option in _FEATURE_SIZES.items()}
    sizes = _sizes(arguments.dataset, arguments.num_items, features)
    device = config.runtime.device
    # A run on GPUs can be planned on a machine without one.
    device_type = choose_device(device).type if device == "auto" else device
    size = arguments.dataset or f"{arguments.num_items:,} items"
    print_start("plan", [size], runs_on=f"for {arguments.world_size} {device_type} ranks")
    ranks = Ranks(arguments.world_size, local_size, device_type)
    reading = Reading(arguments.num_interactions)
    if arguments.dataset:
        reading = Reading.of(Dataset(as_path(arguments.dataset)).manifest)
    plans = plan_memory(config, sizes, ranks)
    memory = {plan.spec.stage: estimate_memory(plan, sizes, ranks, reading) for plan in plans}
    limit = arguments.memory_per_rank_gb
    print(f"{sizes.num_items} items on {ranks.size} {device_type} ranks, {local_size} per machine")
    for plan in plans:
        lines = _lines(plan, ranks.size) + _memory_lines(memory[plan.spec.stage], limit)
        lines += _idle_lines(plan, ranks.size) + _step_lines(plan, reading, arguments.examples_per_second)
        print("\n" + "\n".join(lines))
    print_result("plan", _verdict(plans, {stage: found.peak / GIB for stage, found in memory.items()}, limit))


def _verdict(plans: "Sequence[StagePlan]", peaks: dict["StageName", float], limit: float | None) -> str:
    for plan in plans:
        if plan.problem:
            raise UserError(f"stage {plan.spec.stage}: {plan.problem}")
    stage, peak = max(peaks.items(), key=lambda found: found[1])
    if limit and peak > limit:
        raise UserError(
            f"stage {stage} needs about {peak:.2f} GiB on a rank, and --memory_per_rank_gb is {limit:g}; the plan "
            "lists what takes it: start more ranks, or lower blend.k_neighbors or batch_size"
        )
    verdict = f"about {peak:.2f} GiB on a rank" + (f" of {limit:g}" if limit else "")
    return f"the tables of {', '.join(peaks)} fit; {verdict}"


def _sizes(dataset: str | None, num_items: int | None, features: dict[str, int]) -> "CatalogSizes":
    from llmgr_rec.training.memory_plan import CatalogSizes

    if (dataset is None) == (num_items is None):
        raise UserError("give either --dataset DATASET or --num_items N, so that the size of the catalog is known")
    if dataset is not None:
        from llmgr_rec.data.dataset import Dataset

        return CatalogSizes.of(Dataset(as_path(dataset)))
    assert num_items is not None
    return CatalogSizes(num_items, {name: size for name, size in features.items() if size > 0})


def _lines(plan: "StagePlan", world_size: int) -> list[str]:
    from llmgr_rec.distributed.item_vectors import keeps_vectors

    spec, config = plan.spec, plan.spec.config
    limit = config.tables.memory_per_rank_gb
    lines = [f"stage {spec.stage}, trains {', '.join(spec.trains)}"]
    lines.append(
        f"  {'table':<12}{'rows':>12}{'columns':>9}  {'sharding':<16}{'ranks':<12}{'GiB per rank':>13}  optimizer"
    )
    for table in plan.tables:
        size = table.footprint
        state = f"{config.tables.optimizer}, state {size.state_bytes / GIB:.3f} GiB" if size.state_bytes else "no state"
        share = max(table.bytes_per_rank.values(), default=0) / GIB
        lines.append(
            f"  {size.table:<12}{size.rows:>12}{size.dim:>9}  {table.sharding or '-':<16}"
            f"{_ranks(sorted(table.bytes_per_rank)):<12}{f'{share:.3f}' if table.sharding else '-':>13}  {state}"
        )
    if plan.problem:
        lines.append(f"  DOES NOT FIT into {limit:g} GiB per rank")
    else:
        largest = max(plan.bytes_per_rank.values(), default=0) / GIB
        lines.append(f"  fits: at most {largest:.3f} of {limit:g} GiB on a rank")
    counts = ", ".join(f"{group} {number:,}" for group, number in sorted(plan.parameters.items()))
    lines.append(f"  dense parameters: {counts}; {plan.dense_bytes / GIB:.3f} GiB per rank with gradients and AdamW")
    if plan.decoder_ranks > 1:
        lines.append(
            f"  the language model is sharded across {plan.decoder_ranks} ranks; layers are gathered one at a time"
        )
    lines.append(f"  pipelined lookups: {', '.join(plan.pipelined) or 'NONE'}")
    if plan.blocking:
        lines.append(f"  blocking lookups: {', '.join(plan.blocking)}")
    if plan.cached_bytes:
        lines.append(f"  cached item vectors: {plan.cached_bytes / GIB:.3f} GiB per rank")
    ranking = 4 * plan.query_width * -(-spec.num_items // world_size) / GIB
    kept = keeps_vectors(spec.num_items, world_size, plan.query_width)
    lines.append(f"  item vectors for ranking: {ranking:.3f} GiB per rank, {'kept' if kept else 'computed in blocks'}")
    return lines


def _memory_lines(memory: "RankMemory", limit_gb: float | None) -> list[str]:
    """What takes the memory of the rank that needs most."""
    lines = ["  memory of the rank that needs most, estimated:"]
    phases = {
        "before": memory.preflight,
        "always": memory.always,
        "in a step": memory.training,
        "in saving": memory.saving,
        "in selection": memory.selection,
    }
    for title, parts in phases.items():
        lines += [f"    {title:<13}{name:<40}{size / GIB:>9.3f} GiB" for name, size in parts.items() if size]
    verdict = ""
    if limit_gb:
        verdict = (
            f"; fits into {limit_gb:g} GiB"
            if memory.peak / GIB <= limit_gb
            else f"; DOES NOT FIT into {limit_gb:g} GiB"
        )
    lines.append(f"    {'peak':<53}{memory.peak / GIB:>9.3f} GiB{verdict}")
    lines.append(f"  a checkpoint takes {memory.checkpoint / GIB:.3f} GiB of disk, all ranks together")
    return lines


def _idle_lines(plan: "StagePlan", world_size: int) -> list[str]:
    """A warning if ranks have hardly any rows, and what would use all."""
    held = plan.bytes_per_rank
    largest = max(held.values(), default=0)
    used = sum(size * 10 >= largest for size in held.values())
    if plan.problem or not largest or used == world_size:
        return []
    columns = 4 * world_size
    remedies = [f"start {used} ranks", f"set --tables.dim {columns} (4 columns for each rank)"]
    if plan.spec.config.runtime.device == "cuda" and plan.spec.config.tables.sharding != "auto":
        remedies.insert(0, "set --tables.sharding auto, which also has row-wise layouts on GPUs")
    return [
        f"  warning: {world_size - used} of {world_size} ranks hold no table, or less than a tenth of the fullest "
        f"rank; to use all: {', or '.join(remedies)}"
    ]


def _step_lines(plan: "StagePlan", reading: "Reading", rate: float | None) -> list[str]:
    """Steps of a stage, and its time at a measured rate of examples per second on all ranks."""
    stage = plan.spec.config.stage(plan.spec.stage)
    examples = reading.examples(plan.spec)
    if examples is None:
        return ["  steps: give --dataset or --num_interactions"]
    from llmgr_rec.training.remaining_time import number_of_steps

    steps = number_of_steps(stage, examples)
    line = f"  about {steps:,} steps of {stage.batch_size} examples in {stage.epochs} epochs"
    if rate:
        seconds = round(steps * stage.batch_size / rate)
        line += f"; {timedelta(seconds=seconds)} at {rate:g} examples/s"
    return [line]


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks)) or "-"


if __name__ == "__main__":
    run_cli(main)
