"""From which rows of a trained model's tables those of a model with another catalog start: by item id and by value.

An item or value that both catalogs have keeps its row, wherever it is. The row of a new item is a weighted mean of the
rows of the most similar known items, by the same similarity and weights as in the smoothing of cold items.

Shapes: V items and R rows of a table of the new catalog, N new items, K neighbors, U items of a block, C columns.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from llmgr_rec.baselines.knn_smoothing import K_NEIGHBORS, neighbor_weights
from llmgr_rec.baselines.sparse_scores import best_entries
from llmgr_rec.baselines.text_knn import TEXT_FIELDS, word_weights
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.collate import ITEM_ID
from llmgr_rec.data.side_values import side_values
from llmgr_rec.storage.table_io import Shard, local_shards

# Reads rows of a table of the trained model, float32 [rows, columns], in the order of the rows; a row may be repeated.
ReadRows = Callable[[Tensor, range], Tensor]

# Items whose similarities are in memory at a time, and rows that are copied at a time.
_BLOCK_ITEMS = 1024
_COPY_ROWS = 65536


@dataclass(frozen=True)
class CatalogMapping:
    """Rows of an earlier catalog from which those of a new one start.

    Args:
        known_V: Row of each item in the earlier catalog, int64; -1 for a new item.
        neighbors_NK: Rows of the neighbors of each new item, in order of the items; int64.
        weights_NK: Their weights, float32; 0 for an item with fewer neighbors.
        trained: Rows of the earlier items with training clicks, or of all if there are none; int64.
        values: Row of each value of a side feature in the earlier table of the feature, int64; -1 for a new value.
        num_gone: Number of items that only the earlier catalog has.
        earlier_hash: `Catalog.hash` of the earlier catalog.
    """

    known_V: Tensor
    neighbors_NK: Tensor
    weights_NK: Tensor
    trained: Tensor
    values: dict[str, Tensor]
    num_gone: int
    earlier_hash: str

    @classmethod
    def between(cls, earlier: Catalog, new: Catalog) -> "CatalogMapping":
        """Maps two catalogs, whose ids may have different types.

        Args:
            earlier: Catalog of the trained model.
            new: The new one.

        Raises:
            UserError: Another version of llmgr_rec made a catalog.
        """
        known_V = torch.from_numpy(earlier.index_of(new.item_ids))
        is_trained_V = earlier.train_count_V > 0
        # A catalog that was extended by new items alone has no items with training clicks.
        trained = (is_trained_V if is_trained_V.any() else ~is_trained_V).nonzero().flatten()
        new_items = (known_V < 0).nonzero().flatten()
        neighbors_NK, weights_NK = nearest_known(_texts_of(earlier, trained), _texts_of(new, new_items))
        return cls(
            known_V=known_V,
            neighbors_NK=trained[neighbors_NK],
            weights_NK=weights_NK,
            trained=trained,
            values=_values(earlier, new),
            num_gone=earlier.num_items - int((known_V >= 0).sum()),
            earlier_hash=earlier.hash,
        )

    @property
    def num_new(self) -> int:
        """Number of new items N."""
        return len(self.neighbors_NK)

    @property
    def new_items(self) -> Tensor:
        """Indices of the new items in the new catalog, int64 [N]."""
        return (self.known_V < 0).nonzero().flatten()

    def summary(self) -> str:
        """Numbers of known, new and gone items."""
        placed = int(self.weights_NK.any(dim=1).sum())
        new = f"{self.num_new:,} new" + (f" ({placed:,} of them with similar texts)" if self.num_new else "")
        known = len(self.known_V) - self.num_new
        doubt = "" if known else "; no item has the id of an item of the run, check that both are written alike"
        return f"{known:,} items known, {new}, {self.num_gone:,} gone{doubt}"

    def fill_table(self, module: nn.Module, parameter: str, table: str, read: ReadRows) -> None:
        """Writes rows to this rank's shards of a table of the new model; rows of new values of a side feature stay.

        Args:
            module: The new model, sharded or not.
            parameter: Qualified name of the table's parameter.
            table: Name of the table.
            read: Reads the table of the trained model.
        """
        for shard in (one for one in local_shards(module) if one.parameter == parameter):
            self.fill_shard(replace(shard, table=table), read)

    def fill_shard(self, shard: Shard, read: ReadRows) -> None:
        """Writes rows to a shard; see `fill_table`.

        Args:
            shard: The shard, with the name of the table that is read.
            read: Reads the table of the trained model.
        """
        self._fill(shard, self.values.get(shard.table, self.known_V), read)
        if shard.table == ITEM_ID:
            self._fill_new_items(shard, read)

    def item_rows(self, values_VC: Tensor) -> Tensor:
        """Rows of the items of the new catalog, from a tensor with a row for each item of the earlier one.

        Args:
            values_VC: A row, or a number, for each earlier item.
        """
        values_VC = values_VC if values_VC.dim() > 1 else values_VC.unsqueeze(1)
        shard = Shard("", ITEM_ID, values_VC.new_empty(len(self.known_V), values_VC.shape[1]), 0, 0, 0, 0)
        self.fill_shard(shard, lambda rows, _: values_VC[rows])
        return shard.tensor

    def _fill(self, shard: Shard, rows_R: Tensor, read: ReadRows) -> None:
        columns = range(shard.col_offset, shard.col_offset + shard.tensor.shape[1])
        for start in range(0, shard.tensor.shape[0], _COPY_ROWS):
            target = shard.tensor[start : start + _COPY_ROWS]
            rows_U = rows_R[shard.row_offset + start :][: len(target)]
            is_known_U = rows_U >= 0
            target[is_known_U.to(target.device)] = read(rows_U[is_known_U], columns).to(target)

    def _fill_new_items(self, shard: Shard, read: ReadRows) -> None:
        columns = range(shard.col_offset, shard.col_offset + shard.tensor.shape[1])
        places_N = self.new_items - shard.row_offset
        (mine,) = ((places_N >= 0) & (places_N < shard.tensor.shape[0])).nonzero(as_tuple=True)
        mean_C: Tensor | None = None
        for part in mine.split(_BLOCK_ITEMS):
            neighbors_UK, weights_UK = self.neighbors_NK[part], self.weights_NK[part]
            has_neighbors_U = weights_UK.any(dim=1)
            rows_UKC = read(neighbors_UK.flatten(), columns).unflatten(0, neighbors_UK.shape)
            mean_UC = (rows_UKC * weights_UK.unsqueeze(2)).sum(dim=1)
            if not has_neighbors_U.all():
                mean_C = self._mean_row(columns, read) if mean_C is None else mean_C
                mean_UC[~has_neighbors_U] = mean_C
            shard.tensor[places_N[part].to(shard.tensor.device)] = mean_UC.to(shard.tensor)

    def _mean_row(self, columns: range, read: ReadRows) -> Tensor:
        """The mean row of the earlier items with training clicks, which a new item without similar texts starts from.

        A row of zeros would rank before all items with negative scores.
        """
        sum_C = torch.zeros(len(columns), dtype=torch.float64)
        for rows in self.trained.split(_COPY_ROWS):
            sum_C += read(rows, columns).double().sum(dim=0)
        return (sum_C / len(self.trained)).float()


def nearest_known(known_texts: list[str], new_texts: list[str]) -> tuple[Tensor, Tensor]:
    """The most similar known texts of each new one, by the cosine of TF-IDF vectors over both.

    Args:
        known_texts: Texts of the known items.
        new_texts: Texts of the N new items.

    Returns:
        Positions in the known texts, int64 [N, K], and weights, float32 [N, K]; weight 0 fills rows of texts with fewer
        neighbors.
    """
    num_new, num_known = len(new_texts), len(known_texts)
    ids_NK = torch.zeros(num_new, K_NEIGHBORS, dtype=torch.int64)
    cosines_NK = torch.zeros(num_new, K_NEIGHBORS)
    if not (num_new and num_known):
        return ids_NK, cosines_NK
    weights = word_weights([*known_texts, *new_texts])[1]
    lengths = np.sqrt(np.asarray(weights.multiply(weights).sum(axis=1)).ravel())
    unit = sparse.csr_array(sparse.diags_array(1 / np.where(lengths > 0, lengths, 1.0)) @ weights)
    known_TV = unit[:num_known].T.tocsr()
    for start in range(0, num_new, _BLOCK_ITEMS):
        cosine_UV = sparse.csr_array(unit[num_known + start : num_known + start + _BLOCK_ITEMS] @ known_TV)
        entries, rows, rank = best_entries(cosine_UV, K_NEIGHBORS)
        ids_NK[start + rows, rank] = torch.from_numpy(cosine_UV.indices[entries].astype(np.int64))
        cosines_NK[start + rows, rank] = torch.from_numpy(cosine_UV.data[entries].astype(np.float32))
    return ids_NK, neighbor_weights(cosines_NK)


def _texts_of(catalog: Catalog, items: Tensor) -> list[str]:
    texts = catalog.texts(list(TEXT_FIELDS), required=False)
    return [texts[item] for item in items.tolist()]


def _values(earlier: Catalog, new: Catalog) -> dict[str, Tensor]:
    known, values = side_values(earlier), side_values(new)
    rows = {}
    for name in new.features:
        ids = {value: row for row, value in enumerate(known.get(name, []))}
        rows[name] = torch.tensor([ids.get(value, -1) for value in values[name]], dtype=torch.int64)
    return rows
