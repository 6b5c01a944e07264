"""Sorted clicks become sessions, one row each, as `python -m llmgr_rec.score` and `prepare --sessions` read them."""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa


def sessions_schema() -> pa.Schema:
    """Columns of sessions.parquet: session_id string, items list<string>, oldest first."""
    return pa.schema([("session_id", pa.string()), ("items", pa.list_(pa.string()))])


def session_batches(clicks: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yields sessions in the order of their clicks.

    Args:
        clicks: Columns session number, session id, item id; the clicks of a session follow each other.
    """
    rest: pa.Table | None = None
    for batch in clicks:
        table = pa.Table.from_batches([batch])
        table = table if rest is None else pa.concat_tables([rest, table])
        numbers = table.column(0).to_numpy()
        # The last session may continue in the next batch.
        complete = int(np.searchsorted(numbers, numbers[-1], side="left"))
        if complete:
            yield _sessions(table.slice(0, complete))
        rest = table.slice(complete)
    if rest is not None and rest.num_rows:
        yield _sessions(rest)


def _sessions(clicks: pa.Table) -> pa.RecordBatch:
    numbers = clicks.column(0).to_numpy()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(numbers)) + 1])
    offsets = np.append(starts, len(numbers)).astype(np.int32)
    ids, items = (clicks.column(place).combine_chunks() for place in (1, 2))
    lists = pa.ListArray.from_arrays(pa.array(offsets), items.cast(pa.string()))
    return pa.record_batch([ids.take(pa.array(starts)).cast(pa.string()), lists], schema=sessions_schema())
