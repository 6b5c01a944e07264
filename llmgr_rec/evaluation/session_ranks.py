"""Target ranks by session, in a Parquet file beside metrics.json: the report compares models of different runs by it.

A session takes a byte for each model, before compression.

Shapes: B sessions of a batch, S sessions of a split.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llmgr_rec.checksums import file_checksum, verify_file
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.schema import DOMAIN
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.exclusion import RankingRule
from llmgr_rec.evaluation.protocol import identity, split_reader
from llmgr_rec.evaluation.rank_collector import TargetRanks
from llmgr_rec.files import atomic_write

# Columns of the file beside those of the models.
CLICKS, TRAIN_COUNT = "clicks", "train_count"
RANK_PREFIX = "rank_"
_KIND = {b"llmgr_rec.kind": b"target_ranks"}
_READ_ROWS = 8192


@dataclass(frozen=True)
class Sessions:
    """What the results are grouped by.

    Args:
        clicks_S: Number of clicks that are shown to the models, int32.
        train_count_S: Training clicks of the target, int64.
        domains: Names of the domains; empty for a catalog of one log.
        domain_S: Place in `domains` of that of the target, int16; empty without domains.
    """

    clicks_S: NDArray[np.int32]
    train_count_S: NDArray[np.int64]
    domains: tuple[str, ...] = ()
    domain_S: NDArray[np.int16] = field(default_factory=lambda: np.empty(0, np.int16))

    @classmethod
    def of(cls, dataset: Dataset, split: str, catalog: Catalog, rule: RankingRule) -> "Sessions":
        """The sessions of a split, in the order in which they are evaluated.

        Args:
            dataset: Prepared sessions.
            split: valid or test.
            catalog: The data set's items.
            rule: Says how many clicks are shown.
        """
        clicks, counts = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        places = [np.empty(0, np.int16)]
        train_count_V = catalog.train_count_V.numpy()
        for raw in split_reader(dataset, split, _READ_ROWS, identity).batches(0):
            is_real_B = raw.weights_B.numpy() > 0
            lengths_B = np.minimum(np.diff(raw.offsets_B1.numpy()), rule.max_length)
            clicks.append(lengths_B[is_real_B].astype(np.int32))
            targets = raw.targets_B.numpy()[is_real_B]
            counts.append(train_count_V[targets])
            if catalog.domains:
                places.append(catalog.domains.of_item_V.numpy()[targets])
        names = catalog.domains.names if catalog.domains else ()
        return cls(np.concatenate(clicks), np.concatenate(counts), names, np.concatenate(places))


def ranks_path(metrics: Path) -> Path:
    """The file of target ranks that belongs to a metrics file.

    Args:
        metrics: The metrics file.
    """
    return metrics.with_name(f"{metrics.stem}.ranks.parquet")


def write_ranks(file: Path, ranks: Mapping[str, TargetRanks], sessions: Sessions) -> str:
    """Writes the target ranks of all models atomically.

    Args:
        file: File to create or replace.
        ranks: Target ranks [S] by model.
        sessions: The sessions, in the same order.

    Returns:
        Checksum of the file.
    """
    columns = {CLICKS: sessions.clicks_S, TRAIN_COUNT: sessions.train_count_S}
    if sessions.domains:
        columns[DOMAIN] = pa.DictionaryArray.from_arrays(pa.array(sessions.domain_S), pa.array(sessions.domains))
    columns |= {f"{RANK_PREFIX}{name}": ranks_S for name, ranks_S in ranks.items()}
    table = pa.table(columns).replace_schema_metadata(_KIND)
    with atomic_write(file) as partial:
        pq.write_table(table, partial, compression="zstd")
        return file_checksum(partial)


def refuse_foreign_ranks(file: Path) -> None:
    """Checks that a path is absent or a file of target ranks.

    Args:
        file: The file to write.

    Raises:
        UserError: The path is something else.
    """
    if not file.exists():
        return
    try:
        is_ours = (pq.read_schema(file).metadata or {}).items() >= _KIND.items()
    except (OSError, pa.ArrowInvalid):
        is_ours = False
    if not is_ours:
        raise UserError(f"{file} would be replaced and is not a file of target ranks; give another --output")


def read_ranks(metrics: Path, content: Mapping[str, Any], model: str) -> TargetRanks | None:
    """Target ranks of a model, uint8 [S].

    Args:
        metrics: A metrics file.
        content: Its content.
        model: Name of the model.

    Returns:
        The ranks; None if the evaluation did not store them, or their file was not kept beside the metrics file.

    Raises:
        UserError: The file is damaged or belongs to another evaluation.
    """
    file = ranks_path(metrics)
    recorded = content.get("ranks_checksum")
    if not recorded or not file.is_file():
        return None
    verify_file(file, recorded, f"evaluate again with --output {metrics}")
    column = pq.read_table(file, columns=[f"{RANK_PREFIX}{model}"]).column(0)
    return column.to_numpy()
