"""`python -m llmgr_rec.plan`: table sharding, memory and trained parameters of a run, before it starts.

    python -m llmgr_rec.plan --config paper --dataset DATASET --world_size 8
    python -m llmgr_rec.plan --num_items 100000000 --world_size 16 --tables.memory_per_rank_gb 64

Requires neither data nor several processes. If the tables do not fit, the exit code is 2 and the message says how to
fix it.
"""

from collections.abc import Sequence
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
    from llmgr_rec.training.memory_plan import CatalogSizes, StagePlan

GIB = 1024**3
# Option with the vocabulary size of each side feature.
_FEATURE_SIZES = {"category": "num_categories", "brand": "num_brands", "word": "num_words"}

_ROWS = Bounds(at_least=0, at_most=2**40)
_BOUNDS = {
    "num_items": Bounds(at_least=1, at_most=2**40),
    **dict.fromkeys(_FEATURE_SIZES.values(), _ROWS),
    "world_size": Bounds(at_least=1, at_most=65_536),
    "local_world_size": Bounds(at_least=1, at_most=1024),
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
    add_config_arguments(parser)
    arguments, config = parse_with_config(parser, argv)
    check_options({name: arguments[name] for name in _BOUNDS}, _BOUNDS)
    local_size = arguments.local_world_size or min(arguments.world_size, 8)
    if local_size < 1 or arguments.world_size % local_size:
        raise UserError(
            f"--local_world_size {local_size} does not divide --world_size {arguments.world_size}; "
            "give the ranks per machine"
        )

    with command_imports():
        from llmgr_rec.distributed.process_group import choose_device
        from llmgr_rec.training.memory_plan import Ranks, plan_memory

    features = {name: getattr(arguments, option) for name, option in _FEATURE_SIZES.items()}
    sizes = _sizes(arguments.dataset, arguments.num_items, features)
    device = config.runtime.device
    # A run on GPUs can be planned on a machine without one.
    device_type = choose_device(device).type if device == "auto" else device
    size = arguments.dataset or f"{arguments.num_items:,} items"
    print_start("plan", [size], runs_on=f"for {arguments.world_size} {device_type} ranks")
    plans = plan_memory(config, sizes, Ranks(arguments.world_size, local_size, device_type))
    print(f"{sizes.num_items} items on {arguments.world_size} {device_type} ranks, {local_size} per machine")
    for plan in plans:
        print("\n" + "\n".join(_lines(plan, arguments.world_size)))
    for plan in plans:
        if plan.problem:
            raise UserError(f"stage {plan.spec.stage}: {plan.problem}")
    print_result("plan", f"the tables of {', '.join(plan.spec.stage for plan in plans)} fit")


def _sizes(dataset: str | None, num_items: int | None, features: dict[str, int]) -> "CatalogSizes":
    from llmgr_rec.training.memory_plan import CatalogSizes

    if (dataset is None) == (num_items is None):
        raise UserError("give either --dataset DATASET or --num_items N, so that the size of the catalog is known")
    if dataset is not None:
        from llmgr_rec.data.dataset import Dataset

        manifest = Dataset(as_path(dataset)).manifest
        return CatalogSizes(
            manifest.num_items, {name: feature["num_embeddings"] for name, feature in manifest.features.items()}
        )
    assert num_items is not None
    return CatalogSizes(num_items, {name: size for name, size in features.items() if size > 0})


def _lines(plan: "StagePlan", world_size: int) -> list[str]:
    spec, config = plan.spec, plan.spec.config
    limit = config.tables.memory_per_rank_gb
    lines = [f"stage {spec.stage}, trains {', '.join(spec.trains)}"]
    lines.append(
        f"  {'table':<12}{'rows':>12}{'columns':>9}  {'sharding':<16}{'ranks':<12}{'GiB per rank':>13}  optimizer"
    )
    totals: dict[int, int] = {}
    for table in plan.tables:
        size = table.footprint
        for rank, table_bytes in table.bytes_per_rank.items():
            totals[rank] = totals.get(rank, 0) + table_bytes
        state = f"{config.tables.optimizer}, state {size.state_bytes / GIB:.3f} GiB" if size.state_bytes else "no state"
        share = max(table.bytes_per_rank.values(), default=0) / GIB
        lines.append(
            f"  {size.table:<12}{size.rows:>12}{size.dim:>9}  {table.sharding or '-':<16}"
            f"{_ranks(sorted(table.bytes_per_rank)):<12}{f'{share:.3f}' if table.sharding else '-':>13}  {state}"
        )
    if plan.problem:
        lines.append(f"  DOES NOT FIT into {limit:g} GiB per rank")
    else:
        largest = max(totals.values(), default=0) / GIB
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
    lines.append(f"  item vectors for ranking: {ranking:.3f} GiB per rank")
    return lines


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks)) or "-"


if __name__ == "__main__":
    run_cli(main)
