"""Speed of a tower that encodes a session once for all items that it shows, against once for each item.

```sh
python -m benchmarks.session_tower
```

Shapes: B sessions, C shown items.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.harness import Side, benchmark_parser, rate_table, ratio, set_threads, take_turns, write_report
from llmgr_rec import Catalog, Config, SessionTower, World, build_recommender, export_bundle
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.errors import UserError

TOGETHER, APART = "once a session", "once a shown item"


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and measures."""
    parser = benchmark_parser("session_tower", "Compares encoding a session once with encoding it for each shown item.")
    parser.add_argument("--num_items", type=int, default=10_000, help="Items of the catalog.")
    parser.add_argument("--sessions", type=int, default=64, help="Sessions of a batch.")
    parser.add_argument("--clicks", type=int, default=20, help="Clicks of a session.")
    parser.add_argument("--shown", type=int, default=20, help="Items that a session shows.")
    args = parse_args(parser, argv).as_dict()
    for name in ("num_items", "sessions", "clicks", "shown", "rounds"):
        if args[name] < 1:
            raise UserError(f"--{name} is {args[name]}; set it to 1 or more")
    set_threads(args["threads"])
    with tempfile.TemporaryDirectory(prefix="llmgr-tower-") as folder:
        tower = untrained_tower(Path(folder), args["num_items"])
    together, apart = batches(args["num_items"], args["sessions"], args["clicks"], args["shown"])
    results: dict[str, Any] = {}
    for phase in ("inference", "training"):
        tower.train(phase == "training")
        sides = [Side(TOGETHER, Step(tower, together)), Side(APART, Step(tower, apart))]
        # CPU seconds, because other work on the machine disturbs slices of a few milliseconds.
        rates = take_turns(sides, args["rounds"], clock=time.process_time)
        speed_up = ratio(rates, TOGETHER, APART)
        results[phase] = {"items_per_cpu_s": rate_table(rates), "ratio": speed_up.median}
        print(f"{phase}: {TOGETHER} is {speed_up} times as fast as {APART}")
    write_report(args["output"], args, results)


class Step:
    """A forward pass of a tower over a batch and, in training, the backward pass; returns the number of shown items.

    Args:
        tower: The tower.
        features: The batch.
    """

    def __init__(self, tower: SessionTower, features: KeyedJaggedTensor) -> None:
        self.tower, self.features = tower, features

    def __call__(self) -> float:
        """Does the work."""
        with torch.set_grad_enabled(self.tower.training):
            score_C1 = self.tower(self.features)["score"]
        if self.tower.training:
            score_C1.square().mean().backward()
        return score_C1.shape[0]


def untrained_tower(folder: Path, num_items: int) -> SessionTower:
    """A tower of the default recipe with random weights, for a catalog without side features."""
    ids = pa.array(range(num_items))
    columns = {"index": ids, "item_id": ids, "train_count": ids}
    none = pa.array([[]] * num_items, pa.list_(pa.int64()))
    columns |= {f"{name}_ids": none for name in ("category", "brand", "word")}
    pq.write_table(pa.table(columns), folder / "items.parquet")
    catalog, config = Catalog.load(folder), Config()
    recommender = build_recommender(config, num_items, {})
    bundle = folder / "export" / "sbr"
    bundle.parent.mkdir()
    export_bundle(recommender, "sbr", config, catalog, bundle, World.alone())
    return SessionTower.from_bundle(bundle)


def batches(num_items: int, sessions: int, clicks: int, shown: int) -> tuple[KeyedJaggedTensor, KeyedJaggedTensor]:
    """The same impressions twice: a row for each session, and a row for each shown item."""
    draw = torch.Generator().manual_seed(0)
    clicks_BL = torch.randint(num_items, (sessions, clicks), generator=draw)
    shown_BC = torch.randint(num_items, (sessions, shown), generator=draw)

    def features(clicked: torch.Tensor, items: torch.Tensor) -> KeyedJaggedTensor:
        lengths = [torch.full((len(rows),), rows.shape[1]) for rows in (clicked, items)]
        values = torch.cat([clicked.flatten(), items.flatten()])
        return KeyedJaggedTensor(["clicks", "items"], values, lengths=torch.cat(lengths))

    return features(clicks_BL, shown_BC), features(clicks_BL.repeat_interleave(shown, 0), shown_BC.reshape(-1, 1))


if __name__ == "__main__":
    run_cli(main)
