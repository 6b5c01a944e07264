"""Exact top-K against the bare matrix product and against torch.topk, and its peak memory against all scores at once.

```sh
python -m benchmarks.topk
python -m benchmarks.topk --sweep
```
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.commands import run_module
from benchmarks.harness import (
    Side,
    Spread,
    benchmark_parser,
    peak_memory_mib,
    rate_table,
    ratio,
    set_threads,
    take_turns,
    write_report,
)
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.errors import UserError

TOP_K, BARE, WHOLE = "exact top-K", "bare product", "product and torch.topk"
_MIB = 1 << 20
# Scores of one call of torch.topk.
_MAX_SCORES = 1 << 25
# Items and places of the sweep.
_SWEEP_ITEMS = (500, 1349, 4000, 12_101, 40_000, 200_000, 1_000_000)
_SWEEP_K = (1, 2, 5, 10, 20, 21, 100, 1000)
_RANKS = 2


@dataclass(frozen=True)
class Settings:
    """Sizes of the ranking task.

    Args:
        items: Items.
        dim: Columns of items and queries.
        queries: Queries.
        k: Items per list.
    """

    items: int
    dim: int
    queries: int
    k: int


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and measures."""
    parser = benchmark_parser("topk", "Compares exact top-K with the bare matrix product.")
    parser.add_argument("--items", type=int, default=1_000_000, help="Items.")
    parser.add_argument("--dim", type=int, default=64, help="Columns of items and queries.")
    parser.add_argument("--queries", type=int, default=1024, help="Queries.")
    parser.add_argument("--k", type=int, default=20, help="Items per list.")
    parser.add_argument(
        "--sweep", action="store_true", help="Compare with torch.topk over many sizes, and nothing else."
    )
    parser.add_argument("--memory_only", action="store_true", help="Rank once and print MiB before and at the peak.")
    args = parse_args(parser, argv).as_dict()
    settings = Settings(*(args[name] for name in ("items", "dim", "queries", "k")))
    for name, value in asdict(settings).items():
        if value < 1:
            raise UserError(f"--{name} is {value}; set it to 1 or more")
    threads = set_threads(args["threads"])
    if args["memory_only"]:
        print(*ranking_memory(settings))
        return
    if args["sweep"]:
        speeds = sweep(settings, args["rounds"])
        print(sweep_table(speeds, threads))
        write_report(args["output"], {**args, "threads": threads}, {"speed": speeds})
        return
    results = compare(settings, args["rounds"])
    results["peak_mib"] = memory_in_own_process(settings, threads)
    # Raises where the lists differ; a tenth of the items is enough to compare.
    checked = (max(settings.items // 10, 1), settings.dim, settings.queries // 4 + 1, settings.k)
    run_module("benchmarks.topk_ranks", [str(number) for number in checked], ranks=_RANKS)
    results["ranks_that_agree"] = _RANKS
    print(table(settings, threads, results))
    write_report(args["output"], {**args, "threads": threads}, results)


def compare(settings: Settings, rounds: int) -> dict[str, Any]:
    """Queries per second of each side, and their times as multiples of that of the bare product."""
    from llmgr_rec.kernels.topk import top_k

    queries_BQ, items_RQ = _vectors(settings)

    def rank() -> float:
        top_k(queries_BQ, items_RQ, settings.k)
        return settings.queries

    def multiply() -> float:
        for _ in _score_blocks(queries_BQ, items_RQ):
            pass
        return settings.queries

    def multiply_and_select() -> float:
        for queries_bQ in queries_BQ.split(max(1, min(256, _MAX_SCORES // settings.items))):
            (queries_bQ @ items_RQ.T).topk(min(settings.k, settings.items), dim=1)
        return settings.queries

    rates = take_turns([Side(TOP_K, rank), Side(BARE, multiply), Side(WHOLE, multiply_and_select)], rounds)
    return {
        "queries_per_s": rate_table(rates),
        "times_bare": {name: asdict(ratio(rates, BARE, name)) for name in (TOP_K, WHOLE)},
    }


def sweep(settings: Settings, rounds: int) -> dict[str, dict[str, float]]:
    """Speed of the exact top-K over that of product and torch.topk, by items and by places of a list."""
    speeds: dict[str, dict[str, float]] = {}
    for items in _SWEEP_ITEMS:
        # Fewer queries where the product takes long.
        queries = min(settings.queries, max(64, _MAX_SCORES // items))
        for k in _SWEEP_K:
            times = compare(replace(settings, items=items, queries=queries, k=k), rounds)["times_bare"]
            speeds.setdefault(str(items), {})[str(k)] = times[WHOLE]["median"] / times[TOP_K]["median"]
    return speeds


def sweep_table(speeds: dict[str, dict[str, float]], threads: int) -> str:
    """The sweep as text."""
    lines = [
        f"speed of exact top-K over {WHOLE}, {threads} threads",
        f"{'items':>10}" + "".join(f"{f'k {k}':>9}" for k in _SWEEP_K),
    ]
    lines += [f"{int(items):>10,}" + "".join(f"{row[str(k)]:>9.2f}" for k in _SWEEP_K) for items, row in speeds.items()]
    return "\n".join(lines)


def _vectors(settings: Settings) -> tuple[Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    queries_BQ = torch.randn(settings.queries, settings.dim, generator=generator)
    return queries_BQ, torch.randn(settings.items, settings.dim, generator=generator)


def _score_blocks(queries_BQ: Any, items_RQ: Any) -> Iterator[Any]:
    """Scores in blocks of the size that `top_k` uses, all in one buffer."""
    import torch

    from llmgr_rec.kernels import topk

    height, width = (min(topk._QUERY_BLOCK, queries_BQ.shape[0]), min(topk._CPU_ITEM_BLOCK, items_RQ.shape[0]))
    buffer = queries_BQ.new_empty(height * width)
    for queries_bQ in queries_BQ.split(height):
        for items_NQ in items_RQ.split(width):
            scores_bN = buffer[: queries_bQ.shape[0] * items_NQ.shape[0]].view(-1, items_NQ.shape[0])
            yield torch.mm(queries_bQ, items_NQ.T, out=scores_bN)


def ranking_memory(settings: Settings) -> tuple[float, float]:
    """Peak memory before and after a ranking, in MiB; meaningful in a new process only."""
    from llmgr_rec.kernels.topk import top_k

    queries_BQ, items_RQ = _vectors(settings)
    top_k(queries_BQ[:1], items_RQ[:1], 1)
    before = peak_memory_mib()
    top_k(queries_BQ, items_RQ, settings.k)
    return before, peak_memory_mib()


def memory_in_own_process(settings: Settings, threads: int) -> dict[str, float]:
    """Memory that a ranking adds, and that all scores at once would take, in MiB.

    Raises:
        RuntimeError: It adds a quarter of all scores or more.
    """
    words = [word for name, value in asdict(settings).items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.topk", "--memory_only", "--threads", str(threads), *words]
    before, peak = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    whole = settings.queries * settings.items * 4 / _MIB
    # Below a few hundred MiB, the overhead of the allocator dominates.
    if peak - before > max(whole / 4, 256):
        raise RuntimeError(f"ranking added {peak - before:.0f} MiB, and all scores together take {whole:.0f} MiB")
    return {"vectors_and_libraries": before, "ranking_adds": peak - before, "all_scores_would_take": whole}


def table(settings: Settings, threads: int, results: dict[str, Any]) -> str:
    """The results as text."""
    lines = [
        "",
        f"top {settings.k} of {settings.items:,} items x {settings.dim} for {settings.queries:,} queries, "
        f"{threads} threads",
        f"{'':36}{'queries/s':>34}{'times the bare product':>34}",
    ]
    for name, values in results["queries_per_s"].items():
        times = results["times_bare"].get(name)
        lines.append(f"{name:36}{Spread(**values)!s:>34}{str(Spread(**times)) if times else '':>34}")
    peak = results["peak_mib"]
    lines.append(
        f"memory: ranking adds {peak['ranking_adds']:,.0f} MiB; all scores would take "
        f"{peak['all_scores_would_take']:,.0f} MiB; lists merged from {_RANKS} ranks equal those of one"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
