"""Synthetic sessions with two rules: one that ids can learn, and one that only titles reveal.

    python -m datagen.synthetic --output data/synthetic

With probability 1 - text_share the next item comes from a table of four successors per item. With probability
text_share it is drawn uniformly from the up to 16 items whose title starts with the last word of the previous title.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from datagen.output import describe_output
from llmgr_rec.cli import make_parser, parse_args, progress, run_cli
from llmgr_rec.errors import UserError
from llmgr_rec.first_and_last_line import print_result, print_start
from llmgr_rec.paths import LocalPath


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and writes the folder."""
    parser = make_parser(
        "datagen.synthetic",
        "Writes synthetic interactions.parquet and items.parquet.",
        "--output synthetic",
    )
    parser.add_argument("--output", type=LocalPath, required=True, help="output folder, must not exist or be empty")
    parser.add_argument("--sessions", type=int, default=2000, help="number of sessions, each of one user")
    parser.add_argument("--items", type=int, default=500, help="catalog size, at least 32")
    parser.add_argument("--mean_length", type=float, default=9.0, help="mean clicks per session, at least 2")
    parser.add_argument(
        "--text_share", type=float, default=0.5, help="share of the steps that only titles explain, 0 to 1"
    )
    parser.add_argument(
        "--rare_share", type=float, default=0.3, help="share of the items reached through text only, 0 to 0.9"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed; the same seed gives the same bytes")
    parser.add_argument(
        "--shuffle_titles", action="store_true", help="control: the same sessions with randomly permuted titles"
    )
    parser.add_argument(
        "--oracle", action="store_true", help="print the maximum expected HR@20 with and without titles"
    )
    args = parse_args(parser, argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # A dictionary, because Namespace has methods named like settings (items).
    settings = args.as_dict()
    output, shuffle_titles, oracle = (settings.pop(name) for name in ("output", "shuffle_titles", "oracle"))
    print_start("datagen.synthetic", writes=output)
    generate(output, shuffle_titles=shuffle_titles, **settings)
    if oracle:
        rates = oracle_hit_rate(**settings)
        print("maximum expected HR@20: " + ", ".join(f"{name} {rate:.3f}" for name, rate in rates.items()))
    print_result("datagen.synthetic", describe_output(output), output)


def generate(
    output: str | Path,
    *,
    sessions: int = 2000,
    items: int = 500,
    mean_length: float = 9.0,
    text_share: float = 0.5,
    rare_share: float = 0.3,
    seed: int = 0,
    shuffle_titles: bool = False,
) -> None:
    """Writes interactions.parquet and items.parquet; the arguments are those of the command line.

    Raises:
        UserError: A setting is out of range, or the output folder is not empty.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from datagen import planted
    from datagen.output import interactions_schema, output_folder, write_items_in_parts

    _check(sessions, items, mean_length, text_share, rare_share, seed)
    world = planted.plant(items, mean_length, text_share, rare_share, seed)
    schema = interactions_schema()
    with (
        output_folder(output) as folder,
        progress(sessions, "sessions", "session") as bar,
        pq.ParquetWriter(folder / "interactions.parquet", schema) as writer,
    ):
        done = 0
        for items_L, offsets_B1, timestamps_L in planted.sessions(world, sessions):
            size = len(offsets_B1) - 1
            numbers = pc.utf8_lpad(pa.array(np.arange(done, done + size)).cast(pa.string()), 9, "0")
            user_ids = pc.binary_join_element_wise("u", numbers, "")
            session_L = np.repeat(np.arange(size), np.diff(offsets_B1))
            item_ids = pa.array([planted.item_id(item) for item in items_L.tolist()])
            columns = [user_ids.take(pa.array(session_L)), item_ids, pa.array(timestamps_L)]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            done += size
            bar.update(size)
        write_items_in_parts(folder, planted.item_texts(world, shuffle_titles))


def oracle_hit_rate(
    sessions: int = 2000,
    items: int = 500,
    mean_length: float = 9.0,
    text_share: float = 0.5,
    rare_share: float = 0.3,
    seed: int = 0,
    k: int = 20,
) -> dict[str, float]:
    """Expected HR@k of perfect predictors of the last click; `datagen.planted.oracle_hit_rate` explains the four."""
    from datagen import planted

    _check(sessions, items, mean_length, text_share, rare_share, seed)
    return planted.oracle_hit_rate(planted.plant(items, mean_length, text_share, rare_share, seed), sessions, k)


def _check(sessions: int, items: int, mean_length: float, text_share: float, rare_share: float, seed: int) -> None:
    ranges: list[tuple[str, float, float, float]] = [
        ("sessions", sessions, 1, 10**9),
        ("items", items, 32, 10**8),
        ("mean_length", mean_length, 2, 1000),
        ("text_share", text_share, 0, 1),
        ("rare_share", rare_share, 0, 0.9),
        ("seed", seed, 0, 2**63),
    ]
    for name, value, low, high in ranges:
        if not low <= value <= high:
            raise UserError(f"--{name} is {value}; it must lie between {low} and {high}")


if __name__ == "__main__":
    run_cli(main)
