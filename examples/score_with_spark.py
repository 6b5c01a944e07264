"""Ranks items for sessions inside a Spark job, with the rows of `python -m llmgr_rec.score`: docs/spark.md explains it.

python -m examples.score_with_spark shop/run shop/today shop/spark-scores
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

from pyarrow import RecordBatch

COLUMNS = "session_id string, item_ids array<string>, scores array<float>, fallback boolean"


def main(argv: Sequence[str]) -> None:
    """Reads sessions as Parquet and writes their ranked lists as Parquet."""
    parser = argparse.ArgumentParser(description="Ranks items for sessions inside a Spark job.")
    for name in ("run", "sessions", "output"):
        parser.add_argument(name)
    args = parser.parse_args(argv)
    run = args.run

    def rank(batches: Iterator[RecordBatch]) -> Iterator[RecordBatch]:
        from llmgr_rec import Recommender

        recommender = Recommender.load_once(run)
        for batch in batches:
            yield from recommender.recommend_arrow(batch).to_batches()

    from pyspark.sql import SparkSession

    spark = SparkSession.builder.getOrCreate()
    spark.read.parquet(args.sessions).mapInArrow(rank, COLUMNS).write.parquet(args.output)


if __name__ == "__main__":
    main(sys.argv[1:])
