"""Target ranks of all trials of an experiment by session, in a Parquet file, for statistics of one's own.

Shapes: S sessions.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmgr_rec.experiments.trial import Trial
from llmgr_rec.files import atomic_write


def write_target_ranks(file: Path, trials: Mapping[str, Sequence[Trial]], seeds: Mapping[str, Sequence[int]]) -> None:
    """Writes one row per variant, seed and session.

    Columns: `variant`; `seed`; `session`, the row number of the session in the split, from 0; and `rank` of its target
    in the list, from 1, null where the list does not have it.

    Args:
        file: Parquet file to write.
        trials: Trials by variant name, one per seed.
        seeds: Seeds of the trials, by variant name.
    """
    schema = pa.schema([("variant", pa.string()), ("seed", pa.int64()), ("session", pa.int64()), ("rank", pa.int16())])
    with atomic_write(file) as partial, pq.ParquetWriter(partial, schema) as writer:
        for name, of_variant in trials.items():
            for trial, seed in zip(of_variant, seeds[name], strict=True):
                ranks_S = trial.target_ranks_S
                columns = [
                    pa.repeat(pa.scalar(name), len(ranks_S)),
                    pa.repeat(pa.scalar(seed), len(ranks_S)),
                    pa.array(np.arange(len(ranks_S))),
                    pa.array((ranks_S + 1).astype(np.int16), mask=ranks_S >= trial.depth),
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
