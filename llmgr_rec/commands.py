"""The commands: what each does, in a line, and an example of its arguments."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command of this package.

    Args:
        summary: What it does.
        example: Arguments of an example.
    """

    summary: str
    example: str


# In the order in which they are used.
COMMANDS = {
    "prepare": Command(
        "Makes a data set from a log of clicks, and from an item table if there is one.",
        "--interactions interactions.parquet --items items.parquet --output dataset",
    ),
    "train": Command(
        "Trains a recommender and, if the recipe has one, a language model.",
        "--dataset dataset --output run",
    ),
    "evaluate": Command(
        "Evaluates a run and baselines by ranking the whole catalog.",
        "--run run --dataset dataset --output metrics.json",
    ),
    "score": Command(
        "Ranks the catalog for every session of Parquet files.",
        "--run run --input sessions.parquet --output scores",
    ),
    "extend": Command(
        "Makes a run for the catalog of today, whose new items are ranked by their texts until they are trained.",
        "--run run --items items.parquet --output extended",
    ),
    "explain": Command(
        "Says why a session gets its recommendations.",
        "--run run --items pen,ink,paper",
    ),
    "report": Command(
        "Writes a report of a run as an HTML page.",
        "--run run --metrics metrics.json --output report",
    ),
    "serve": Command(
        "Serves recommendations over HTTP, with a page to try them.",
        "--run run",
    ),
    "export": Command(
        "Writes a session recommender as a program that needs torch alone.",
        "--run run --output model.pt2",
    ),
    "experiments": Command(
        "Trains and compares the variants of an experiment over seeds.",
        "--experiment backbones --dataset dataset --output runs/backbones --seeds 0,1,2",
    ),
    "plan": Command(
        "Prints table sharding, memory and trained parameters of a run, before it starts.",
        "--num_items 100000000 --world_size 16 --tables.memory_per_rank_gb 64",
    ),
    "doctor": Command(
        "Checks this machine, and says how to fix what is wrong.",
        "--core",
    ),
}
