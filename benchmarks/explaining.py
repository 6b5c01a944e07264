"""Time to explain the recommendations for a session, by its number of clicks.

```sh
python -m benchmarks.explaining --run RUN --threads 1
```
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.harness import Spread, benchmark_parser, set_threads, write_report
from llmgr_rec.cli import add_run_argument, parse_args, run_cli
from llmgr_rec.errors import UserError

if TYPE_CHECKING:
    from llmgr_rec import Recommender

LENGTHS = (1, 5, 10, 20, 50)


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and measures."""
    parser = benchmark_parser("explaining", "Measures the time to explain recommendations.", "--run run")
    add_run_argument(parser)
    parser.add_argument("--k", type=int, default=10, help="Recommended items that are explained.")
    args = parse_args(parser, argv).as_dict()
    if args["rounds"] < 1:
        raise UserError(f"--rounds is {args['rounds']}; set it to 1 or more")
    set_threads(args["threads"])

    from llmgr_rec import Recommender

    recommender = Recommender.load(args["run"])
    clocks: dict[str, Callable[[], float]] = {"elapsed": time.perf_counter, "CPU": time.process_time}
    results = {
        name: {str(length): milliseconds(recommender, length, args["k"], args["rounds"], clock) for length in LENGTHS}
        for name, clock in clocks.items()
    }
    for name, by_length in results.items():
        shown = ", ".join(f"{length} clicks {spread}" for length, spread in by_length.items())
        print(f"{name}, ms for {args['k']} items of {len(recommender.item_ids):,}: {shown}")
    as_numbers = {name: {key: asdict(spread) for key, spread in row.items()} for name, row in results.items()}
    write_report(args["output"], args, as_numbers)


def milliseconds(recommender: "Recommender", length: int, k: int, rounds: int, clock: Callable[[], float]) -> Spread:
    """Milliseconds to explain the recommendations for sessions of random items, one session a round."""
    rng = np.random.default_rng(0)
    ids = recommender.item_ids.to_pylist()
    times = []
    # The first explanation reads the parts of the blend and the words.
    for _ in range(rounds + 1):
        session = [ids[place] for place in rng.integers(len(ids), size=length)]
        started = clock()
        recommender.explain(session, k)
        times.append(1000 * (clock() - started))
    return Spread.of(times[1:])


if __name__ == "__main__":
    run_cli(main)
