"""Ranking quality and speed of the cheaper modes of scoring, on the validation sessions of a run.

```sh
python -m benchmarks.quality_cost --run runs/beauty/run --dataset runs/beauty/dataset
```

Shapes: S sessions, K items of a ranked list.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks.harness import Side, Spread, benchmark_parser, rate_table, ratio, set_threads, take_turns, write_report
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.config_file import load_config
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.paths import LocalPath
from llmgr_rec.scoring.routing import uncertainty
from llmgr_rec.scoring.score_run import ScoreRequest, score_run
from llmgr_rec.storage.number_format import resolve_dtype
from llmgr_rec.storage.pretrained import num_decoder_layers

K = 20
BUDGETS = (0.0, 0.1, 0.25, 0.5)
_RESAMPLES = 2000
# Intervals of 95 %.
_TAILS = (2.5, 97.5)
FULL = "float32"
ROUTED = "routed to the LLM, else GNN"


@dataclass(frozen=True)
class Mode:
    """A mode of scoring.

    Args:
        name: Name in the results.
        family: Modes of one family are joined by a line in the plot.
        options: Its values of fields of `ScoreRequest`.
    """

    name: str
    family: str
    options: Mapping[str, Any] = field(default_factory=dict)


def main(argv: Sequence[str]) -> None:
    """Command line."""
    parser = benchmark_parser(
        "quality_cost", "Measures quality and speed of the cheaper modes of scoring.", "--run run --dataset dataset"
    )
    parser.add_argument("--run", type=LocalPath, required=True, help="Run folder made by llmgr_rec.train.")
    parser.add_argument("--dataset", type=LocalPath, required=True, help="Folder made by llmgr_rec.prepare.")
    parser.add_argument(
        "--sessions", type=int, default=0, help="Number of validation sessions, from the first; 0 takes all."
    )
    parser.add_argument("--plot", type=LocalPath, help="SVG file; default beside the JSON file.")
    args = parse_args(parser, argv)
    set_threads(args.threads)
    logging.getLogger("llmgr_rec").setLevel(logging.ERROR)
    run, dataset = Path(args.run), Dataset(Path(args.dataset))
    with TemporaryDirectory() as folder:
        source = _input(dataset, args.sessions, Path(folder) / "input.parquet")
        results = measure(list(modes(run)), run, source, Catalog.of(dataset), args.rounds, Path(folder))
    print(table(results))
    write_report(args.output, args.as_dict(), results)
    file = Path(args.plot) if args.plot else Path(args.output).with_suffix(".svg")
    plot(results["modes"], file)
    print(f"written: {file}")


def modes(run: Path) -> Iterator[Mode]:
    """The modes in which a run can be scored."""
    config = load_config(run / "export" / "behave" / "config.yaml")
    layers = num_decoder_layers(config.llm.name_or_path, config.llm.num_layers)
    yield Mode(FULL, "number format", {"llm_dtype": "float32"})
    # bfloat16 where the processor multiplies it natively.
    fast = str(resolve_dtype("auto")).removeprefix("torch.")
    if fast != FULL:
        yield Mode(fast, "number format", {"llm_dtype": fast})
    for kept in range(layers - 1, 0, -1):
        yield Mode(f"{kept} of {layers} layers", "first layers", {"llm_dtype": fast, "llm_layers": kept})
    if config.head.residual:
        for budget in reversed(BUDGETS):
            options = {"llm_dtype": fast, "llm_budget": budget}
            yield Mode(f"LLM for {budget:.0%}, else GNN", ROUTED, options)


def measure(
    chosen: Sequence[Mode], run: Path, source: Path, catalog: Catalog, rounds: int, work: Path
) -> dict[str, Any]:
    """Scores the sessions in every mode in turn, and evaluates the last output of each.

    Args:
        chosen: The modes; the others are compared with the first one.
        run: Run folder.
        source: Sessions with their targets.
        catalog: The items.
        rounds: Rounds that are measured.
        work: Folder for outputs.

    Returns:
        By name of the mode: rates, ratio to the first mode, NDCG and HR with the interval of the paired difference; and
        the routing threshold for each budget.
    """
    rates = take_turns([Side(mode.name, _scoring(mode, run, source, work)) for mode in chosen], rounds, warm_up=0)
    speeds = rate_table(rates)
    outputs = {mode.name: pq.read_table(work / _folder(mode)) for mode in chosen}
    gains = {name: ndcg(output, catalog) for name, output in outputs.items()}
    first = chosen[0].name
    results = {}
    for mode in chosen:
        gains_S = gains[mode.name]
        low, high = paired_interval(gains_S - gains[first])
        results[mode.name] = {
            "family": mode.family,
            "options": dict(mode.options),
            "sessions_per_s": speeds[mode.name],
            "ratio": asdict(ratio(rates, mode.name, first)),
            "ndcg@20": float(gains_S.mean()),
            "hr@20": float((gains_S > 0).mean()),
            "ndcg@20 lost": {"mean": float((gains[first] - gains_S).mean()), "low": -high, "high": -low},
        }
    return {"modes": results, "thresholds": thresholds(chosen, outputs), "sessions": len(outputs[first])}


def _scoring(mode: Mode, run: Path, source: Path, work: Path) -> Any:
    def score() -> float:
        output = work / _folder(mode)
        shutil.rmtree(output, ignore_errors=True)
        request = ScoreRequest(run, source, output, K, ["target"], stage="behave", **mode.options)
        return float(score_run(request).rows_in)

    return score


def _folder(mode: Mode) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in mode.name)


def ndcg(output: pa.Table, catalog: Catalog) -> NDArray[np.float64]:
    """NDCG of each scored session, [S]; 0 where the target is not in the list.

    Args:
        output: Lists of raw item ids, with the target's item index.
        catalog: The items.
    """
    targets_S = np.asarray(catalog.item_ids.take(output["target"].combine_chunks()).to_pylist(), dtype=object)
    lists = output["item_ids"].to_pylist()
    ranks = (ids.index(target) if target in ids else -1 for ids, target in zip(lists, targets_S, strict=True))
    return np.array([0.0 if rank < 0 else 1 / np.log2(rank + 2) for rank in ranks])


def paired_interval(differences_S: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of differences of the same sessions."""
    rng = np.random.default_rng(seed)
    size = len(differences_S)
    means = [differences_S[rng.integers(size, size=size)].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, _TAILS)
    return float(low), float(high)


def thresholds(chosen: Sequence[Mode], outputs: Mapping[str, pa.Table]) -> dict[str, dict[str, float]]:
    """The `--llm_threshold` that routes the share of each budget of these sessions to the LLM, by family."""
    found = {}
    for mode in chosen:
        if mode.options.get("llm_budget") == 0:
            scores_SK = torch.tensor(outputs[mode.name]["scores"].to_pylist())
            unsure_S = uncertainty(scores_SK).numpy()
            found[mode.family] = {f"{budget:g}": float(np.quantile(unsure_S, 1 - budget)) for budget in BUDGETS[1:]}
    return found


def table(results: Mapping[str, Any]) -> str:
    """The results as text."""
    lines = [f"{results['sessions']:,} validation sessions; loss of NDCG@20 against {FULL} with its 95 % interval"]
    for name, mode in results["modes"].items():
        lost = mode["ndcg@20 lost"]
        lines.append(
            f"  {name:28} {Spread(**mode['ratio'])!s:>24} times, {mode['sessions_per_s']['median']:8,.0f} sessions/s  "
            f"NDCG@20 {mode['ndcg@20']:.4f}  HR@20 {mode['hr@20']:.4f}  "
            f"lost {lost['mean']:+.4f} [{lost['low']:+.4f} .. {lost['high']:+.4f}]"
        )
    for family, values in results["thresholds"].items():
        by_budget = ", ".join(f"{budget}: {value:.3f}" for budget, value in values.items())
        lines.append(f"  --llm_threshold in place of a budget ({family}): {by_budget}")
    return "\n".join(lines)


def plot(results: Mapping[str, Any], file: Path) -> None:
    """Draws NDCG@20 against speed, as an SVG file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colors = ("#2b6cb0", "#6b9e3f", "#d2552d")
    families = list(dict.fromkeys(mode["family"] for mode in results.values()))
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "quality-cost"}
    with rc_context(style):
        figure = Figure(figsize=(8, 4.5))
        panel = figure.subplots()
        for family, color in zip(families, colors, strict=False):
            points = [
                (mode["sessions_per_s"]["median"], mode["ndcg@20"], name)
                for name, mode in results.items()
                if mode["family"] == family
            ]
            points.sort()
            panel.plot(*zip(*[point[:2] for point in points], strict=True), "o-", color=color, label=family, alpha=0.8)
            for speed, quality, name in points:
                panel.annotate(name, (speed, quality), (3, 4), textcoords="offset points", fontsize=6.5, color=color)
        panel.set_xscale("log")
        panel.set_xlabel("sessions per second, from Parquet to Parquet, including the loading of the model")
        panel.set_ylabel("NDCG@20 on validation")
        panel.grid(color="#e6e9ed")
        panel.legend(frameon=False)
        figure.tight_layout()
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="svg", metadata={"Date": None})


def _input(dataset: Dataset, sessions: int, path: Path) -> Path:
    """Validation sessions with their targets as one file."""
    rows = pa.concat_tables([pq.read_table(part) for part in dataset.parts("valid")])
    rows = rows.slice(0, sessions or rows.num_rows)
    pq.write_table(rows.select(["session_id", "items", "target"]), path)
    return path


if __name__ == "__main__":
    run_cli(main)
