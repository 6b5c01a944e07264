"""Ranks items for sessions with Ray Data, with the rows of `python -m llmgr_rec.score`: docs/spark.md explains it.

python -m examples.score_with_ray shop/run shop/today shop/ray-scores
"""

import argparse
import sys
from collections.abc import Sequence

import pyarrow as pa


class Ranker:
    """Holds the model of a worker."""

    def __init__(self, run: str) -> None:
        from llmgr_rec import Recommender

        self.recommender = Recommender.load(run)

    def __call__(self, sessions: pa.Table) -> pa.Table:
        """The ranked lists of a batch of sessions."""
        return self.recommender.recommend_arrow(sessions)


def main(argv: Sequence[str]) -> None:
    """Reads sessions as Parquet and writes their ranked lists as Parquet."""
    parser = argparse.ArgumentParser(description="Ranks items for sessions with Ray Data.")
    for name in ("run", "sessions", "output"):
        parser.add_argument(name)
    args = parser.parse_args(argv)

    import ray

    data = ray.data.read_parquet(args.sessions)
    ranked = data.map_batches(Ranker, fn_constructor_args=(args.run,), batch_format="pyarrow", concurrency=1)
    ranked.write_parquet(args.output)


if __name__ == "__main__":
    main(sys.argv[1:])
