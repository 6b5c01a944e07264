"""At which share of repeated targets rankings should exclude the items that a session has clicked.

    python -m benchmarks.repeats_threshold --interactions F --items F

Replaces a share of the clicks by one of the last clicks of their user, so that targets repeat, and evaluates nearest
neighbors and popularity on the test sessions by both rules. A row begins with the share of the targets that `prepare`
measures.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import benchmark_parser, write_report
from llmgr_rec.baselines.builders import DEFAULT_BASELINES, build_baseline
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.comma_separated import split_list
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.preparation.pipeline import prepare_dataset
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.data.repeats import Repeats
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.exclusion import ranking_rule
from llmgr_rec.evaluation.protocol import evaluate_baseline
from llmgr_rec.paths import LocalPath

METRICS = ("ndcg@20", "hr@20")
RULES: tuple[Repeats, ...] = get_args(Repeats)
# Mean number of clicks between a repeat and the click that it repeats.
_MEAN_DISTANCE = 2.0


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark, prints the table and writes the results."""
    parser = benchmark_parser(
        "repeats_threshold",
        "Compares both rules for repeats by the share of repeated targets.",
        "--interactions interactions.parquet --items items.parquet",
    )
    parser.add_argument("--interactions", type=LocalPath, required=True, help="As for llmgr_rec.prepare.")
    parser.add_argument("--items", type=LocalPath, required=True, help="As for llmgr_rec.prepare.")
    parser.add_argument(
        "--shares", type=str, default="0,0.01,0.02,0.03,0.05,0.08,0.12", help="Shares of the clicks to replace."
    )
    args = parse_args(parser, argv).as_dict()
    try:
        shares = [float(share) for share in split_list(args["shares"])]
    except ValueError:
        raise UserError(f"--shares is {args['shares']!r}; give numbers from 0 to 1, separated by commas") from None
    rows = [compare(Path(args["interactions"]), Path(args["items"]), share) for share in shares]
    print(table(rows))
    write_report(args["output"], args, {"rows": rows})


def compare(interactions: Path, items: Path, share: float) -> dict[str, Any]:
    """Measured share of repeated test targets, and the metrics of the baselines by both rules, as JSON values.

    Args:
        interactions: Log of clicks.
        items: Item file.
        share: Share of the clicks to replace.
    """
    with TemporaryDirectory(prefix="repeats-") as name:
        folder = Path(name)
        log = with_repeats(pq.read_table(interactions), share) if share else pq.read_table(interactions)
        pq.write_table(log, folder / "interactions.parquet")
        manifest = prepare_dataset(
            PrepareSettings(str(folder / "dataset"), str(folder / "interactions.parquet"), items=str(items))
        )
        dataset = Dataset(folder / "dataset")
        catalog = Catalog.of(dataset)
        row: dict[str, Any] = {"replaced": share, "repeated_targets": manifest.repeat_counts["test"].target_share}
        for baseline in DEFAULT_BASELINES:
            built = build_baseline(baseline, dataset, catalog)
            for repeats in RULES:
                rule = ranking_rule(manifest, repeats)
                metrics = evaluate_baseline(built, dataset, "test", catalog, World.alone(), rule)
                row[f"{baseline}, {repeats}"] = {metric: metrics[metric] for metric in METRICS}
        return row


def with_repeats(log: pa.Table, share: float, seed: int = 0) -> pa.Table:
    """Replaces clicks by one of the last clicks of their user, the nearest ones most often.

    Args:
        log: Columns user_id, item_id and timestamp.
        share: Share of the clicks, except for the first of each user, to replace.
        seed: Seed of the choice.
    """
    log = log.sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
    users = log["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    starts = np.maximum.accumulate(np.where(np.diff(users, prepend=-1) != 0, np.arange(len(users)), 0))
    rng = np.random.default_rng(seed)
    distance = 1 + rng.exponential(_MEAN_DISTANCE, len(users)).astype(np.int64)
    replaced = (rng.random(len(users)) < share) & (starts < np.arange(len(users)))
    source = np.arange(len(users))
    for place in np.flatnonzero(replaced):
        # A repeat may repeat a repeat.
        source[place] = source[max(starts[place], place - distance[place])]
    items = log["item_id"].combine_chunks().take(pa.array(source))
    return log.set_column(log.schema.get_field_index("item_id"), "item_id", items)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table; the better rule of each baseline is bold."""
    names = [f"{baseline}, {rule}" for baseline in DEFAULT_BASELINES for rule in RULES]
    titles = ["repeated targets", *(f"{METRICS[0].upper()}: {name}" for name in names)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [f"{row['repeated_targets']:.1%}"]
        for baseline in DEFAULT_BASELINES:
            values = [row[f"{baseline}, {rule}"][METRICS[0]] for rule in RULES]
            cells += [f"**{value:.4f}**" if value == max(values) else f"{value:.4f}" for value in values]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
