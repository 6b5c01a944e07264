"""Reads a whole split and prints the MiB that this added to the process; started by `benchmarks.growth`.

```sh
python -m benchmarks.reader_memory FOLDER ITEMS
```
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import peak_memory_mib
from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.reader import SamplingOrder, SessionReader


def main(argv: Sequence[str]) -> None:
    """Reads an epoch in random order, with all prefixes of all rows."""
    folder, items = argv
    before = peak_memory_mib()
    reader: SessionReader[RawSessions] = SessionReader(
        sorted(Path(folder).glob("part-*.parquet")),
        num_items=int(items),
        collate=lambda raw: raw,
        order=SamplingOrder(4096, shuffle=True, augment_prefixes=True),
    )
    for _ in reader.batches(0):
        pass
    print(peak_memory_mib() - before)


if __name__ == "__main__":
    main(sys.argv[1:])
