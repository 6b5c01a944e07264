"""Time and memory of every stage by number of sessions, items and ranks.

```sh
python -m benchmarks.growth
python -m benchmarks.growth --axes items --items 100000 --stages prepare,sbr,evaluate,score
python -m benchmarks.growth --axes items --items 10000000 --times 1 --stages prepare,sbr,evaluate,score
```

Growth is that of processor time, which other load on the machine changes less than elapsed time. The language model is
`random-tiny`: its cost does not depend on the size of the data.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.growth_stages import STAGES, Size, reader_memory, run_stages
from benchmarks.harness import benchmark_parser, write_report
from llmgr_rec.cli import parse_args, progress, run_cli
from llmgr_rec.comma_separated import split_names, split_numbers
from llmgr_rec.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = ("sessions", "items", "ranks")
_COLORS = ("#7f8c9a", "#2b6cb0", "#6b9e3f", "#d2552d", "#8d6bb0", "#b8860b")
# Large enough that row groups are full.
_READER_SESSIONS = 40_000


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and measures."""
    parser = benchmark_parser("growth", "Measures time and memory of every stage by the size of the data.")
    parser.add_argument("--sessions", type=int, default=2000, help="Sessions at 1x.")
    parser.add_argument("--items", type=int, default=1000, help="Items at 1x.")
    parser.add_argument("--steps", type=int, default=30, help="Steps of each of the stages align and behave.")
    parser.add_argument("--axes", type=str, default=",".join(AXES), help="What to vary, separated by commas.")
    parser.add_argument("--stages", type=str, default=",".join(STAGES), help="Stages to run, separated by commas.")
    parser.add_argument("--times", type=str, default="", help="Multiples of 1x; default: those of each axis.")
    parser.add_argument("--quick", action="store_true", help="Two small sizes only, as a smoke test.")
    args = parse_args(parser, argv).as_dict()
    if args["sessions"] < 100 or args["items"] < 32:
        raise UserError("--sessions must be 100 or more, and --items 32 or more")
    if args["quick"]:
        args |= {"sessions": 300, "items": 64, "steps": 10}
    base = Size(args["sessions"], args["items"], 1)
    axes, stages = split_names(args["axes"], "--axes", AXES), split_names(args["stages"], "--stages", STAGES)
    times = _multiples(args["times"]) if args["times"] else None
    grid = {axis: line for axis, line in sizes(base, args["quick"], times).items() if axis in axes}
    results = measure(base, grid, stages, args["steps"], args["threads"])
    print(table(results))
    write_report(args["output"], args, results)
    file = Path(args["output"]).with_suffix(".svg")
    plot(results, file)
    print(f"written: {file}")


def _multiples(text: str) -> tuple[int, ...]:
    times = split_numbers(text, "--times", "1,10")
    if not all(1 <= by < 10**6 for by in times):
        raise UserError(f"--times is {text}; give whole numbers separated by commas, such as 1,10")
    return tuple(times)


def sizes(base: Size, quick: bool, times: tuple[int, ...] | None = None) -> dict[str, list[Size]]:
    """The sizes along each axis, the base first; `times` are multiples of the base in place of the usual ones."""
    by_axis = dict.fromkeys(AXES, times) if times else _QUICK if quick else _FULL
    return {
        "sessions": [Size(base.sessions * by, base.items, 1) for by in by_axis["sessions"]],
        "items": [Size(base.sessions, base.items * by, 1) for by in by_axis["items"]],
        "ranks": [Size(base.sessions, base.items, by) for by in by_axis["ranks"]],
    }


_QUICK: Mapping[str, tuple[int, ...]] = {"sessions": (1, 3), "items": (1,), "ranks": (1,)}
_FULL: Mapping[str, tuple[int, ...]] = {"sessions": (1, 3, 10), "items": (1, 10, 100), "ranks": (1, 2, 4)}


def measure(
    base: Size, grid: Mapping[str, Sequence[Size]], stages: Sequence[str], steps: int, threads: int
) -> dict[str, Any]:
    """Runs stages once at every size."""
    distinct = list(dict.fromkeys(size for line in grid.values() for size in line))
    bar = progress(len(distinct) * len(stages), "growth", "stage")
    costs: dict[Size, Any] = {}
    for size in distinct:
        with tempfile.TemporaryDirectory(prefix="llmgr-growth-") as folder:
            costs[size] = run_stages(Path(folder), size, stages, steps, threads, lambda stage: _advance(bar, stage))
    bar.close()
    axes = {axis: [{"at": getattr(size, axis), "stages": costs[size]} for size in line] for axis, line in grid.items()}
    reader = []
    for by in [size.sessions / base.sessions for size in grid.get("sessions", ())]:
        with tempfile.TemporaryDirectory(prefix="llmgr-growth-") as folder:
            rows = round(_READER_SESSIONS * by)
            reader.append({"at": rows, "added_mib": reader_memory(Path(folder), rows, base.items)})
    return {"axes": axes, "exponents": exponents(axes), "reader": reader}


def _advance(bar: Any, stage: str) -> None:
    bar.set_postfix_str(stage)
    bar.update()


def exponents(axes: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Exponents of growth along each axis: slopes of log(cost) against log(size).

    Returns:
        By axis and stage: `whole` of the processor seconds of the command, including start-up; `above_base` of the
        differences of seconds and size from those of the smallest size, where start-up cancels; `memory` of the
        largest process.
    """
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for axis, points in axes.items():
        at = [float(point["at"]) for point in points]
        found[axis] = {}
        for stage in points[0]["stages"]:
            costs = [point["stages"][stage] for point in points]
            work = [cost["processor_s"] for cost in costs]
            found[axis][stage] = {
                "whole": slope(at, work),
                "above_base": slope([x - at[0] for x in at[1:]], [y - work[0] for y in work[1:]]),
                "memory": slope(at, [cost["process_mib"] for cost in costs]),
            }
    return found


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float | None:
    """Least-squares slope of log(cost) against log(size); None where fewer than two costs are above zero."""
    points = [(math.log(size), math.log(cost)) for size, cost in zip(sizes, costs, strict=True) if cost > 0]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def table(results: Mapping[str, Any]) -> str:
    """The results as text."""
    lines = []
    for axis, points in results["axes"].items():
        lines += ["", f"by {axis}: processor seconds (ms per training step) and MiB of the largest process"]
        stages = list(points[0]["stages"])
        lines.append(f"{axis:>10}" + "".join(f"{stage:>24}" for stage in stages))
        for point in points:
            costs = "".join(f"{_cost(point['stages'][stage]):>24}" for stage in stages)
            lines.append(f"{point['at']:>10,}" + costs)
        for kind, title in (("whole", "exponent"), ("above_base", "above 1x"), ("memory", "memory")):
            values = [results["exponents"][axis][stage][kind] for stage in stages]
            lines.append(f"{title:>10}" + "".join(f"{'' if v is None else f'{v:.2f}':>24}" for v in values))
    reader = ", ".join(f"{line['at']:,} sessions {line['added_mib']:.1f} MiB" for line in results["reader"])
    return "\n".join([*lines, "", f"memory of the reader alone: {reader}"] if reader else lines)


def _cost(cost: Mapping[str, float]) -> str:
    step = f" ({cost['step_ms']:.0f} ms)" if cost["step_ms"] else ""
    return f"{cost['processor_s']:.1f} s{step} {cost['process_mib']:,.0f}"


def plot(results: Mapping[str, Any], file: Path) -> None:
    """Draws seconds and memory of every stage along each axis, as an SVG file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # With a fixed salt the same results give the same bytes.
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "growth"}
    with rc_context(style):
        figure = Figure(figsize=(11, 6))
        panels = figure.subplots(2, len(results["axes"]), squeeze=False)
        for column, axis in enumerate(results["axes"]):
            _draw(panels[0][column], results["axes"][axis], "processor_s")
            _draw(panels[1][column], results["axes"][axis], "tree_mib")
            panels[1][column].set_xlabel(axis)
        panels[0][0].set_ylabel("processor seconds")
        panels[1][0].set_ylabel("MiB of all processes")
        panels[0][0].legend(frameon=False)
        figure.tight_layout()
        figure.savefig(file, format="svg", metadata={"Date": None})


def _draw(panel: "Axes", points: Sequence[Mapping[str, Any]], what: str) -> None:
    for stage, color in zip(STAGES, _COLORS, strict=True):
        if stage not in points[0]["stages"]:
            continue
        values = [point["stages"][stage][what] for point in points]
        panel.plot([point["at"] for point in points], values, marker="o", markersize=4, color=color, label=stage)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.grid(color="#e6e9ed")


if __name__ == "__main__":
    run_cli(main)
