"""Item tables: vectors of items from their ids and side features, by one TorchRec EmbeddingBagCollection.

Shapes: X bags (one per item occurrence: the nodes of a batch, then its candidates), S ids of a feature, F features,
D = d1 columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from llmgr_rec.data.collate import ITEM_ID

torch.fx.wrap("pool")


@dataclass
class ItemRows:
    """Vectors of X item occurrences.

    Args:
        vectors_XD: Item vectors: the id row plus the pooled rows of every side feature.
        ids_XD: The rows of the id table, without side features.
        texts_XH: Rows of the table of text embeddings; None if the model has none.
    """

    vectors_XD: Tensor
    ids_XD: Tensor
    texts_XH: Tensor | None = None


ItemCollection: TypeAlias = EmbeddingBagCollection | EmbeddingCollection | FusedEmbeddingBagCollection


def pool(
    rows: Mapping[str, JaggedTensor], features: Sequence[str], id_features: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Item vectors from the rows of an EmbeddingCollection, which does not pool.

    Args:
        rows: Rows of each feature, one for each of its ids; X bags.
        features: Names of the features.
        id_features: Those of them that look up the table of ids.

    Returns:
        Item vectors and the rows of the id table, [X, D] each.
    """
    bags = {name: _sum_of_bags(rows[name], name in id_features) for name in features}
    return torch.stack(list(bags.values())).sum(0), torch.stack([bags[name] for name in id_features]).sum(0)


def _sum_of_bags(rows: JaggedTensor, is_id: bool) -> Tensor:
    """The sum of the rows of an id feature, or the mean of those of a side feature, by bag, [X, D]."""
    values_SD, lengths_X = rows.values(), rows.lengths().to(torch.int64)
    bag_S = torch.repeat_interleave(
        torch.arange(lengths_X.numel(), device=lengths_X.device), lengths_X, output_size=values_SD.shape[0]
    )
    sums_XD = values_SD.new_zeros(lengths_X.numel(), values_SD.shape[1]).index_add(0, bag_S, values_SD)
    return sums_XD if is_id else sums_XD / lengths_X.clamp(min=1).unsqueeze(1)


class ItemTables(nn.Module):
    """The vector of an item is its id row plus, for each side feature, the mean of its rows.

    One EmbeddingBagCollection contains all tables, so that the planner shards them together and the training pipeline
    overlaps one lookup. Before the lookup, `forward` only accesses attributes of the batch: TorchRec pipelines no
    lookup whose input is computed.

    Args:
        num_items: Rows of the item table.
        num_embeddings: Rows of each side-feature table by feature name, the key in the batch.
        dim: Columns of every table.
        device: Device of the tables; on `meta` the sharder allocates them.
        collection: A collection with the same tables, of any names, that is used in place of a new one.
        id_features: Features of the collection that look up the table of ids.
    """

    def __init__(
        self,
        num_items: int,
        num_embeddings: dict[str, int],
        dim: int,
        device: torch.device | None = None,
        collection: ItemCollection | None = None,
        id_features: Sequence[str] = (ITEM_ID,),
    ) -> None:
        super().__init__()
        self.num_items = num_items
        self.dim = dim
        self.id_features = list(id_features)
        self.ebc = _new_collection(num_items, num_embeddings, dim, device) if collection is None else collection
        self.pools = not isinstance(self.ebc, EmbeddingCollection)
        tables = (
            self.ebc.embedding_configs()
            if isinstance(self.ebc, EmbeddingCollection)
            else self.ebc.embedding_bag_configs()
        )
        self.feature_names = [name for table in tables for name in table.feature_names]

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Looks up item vectors.

        Args:
            features: A bag of ids for each of the X occurrences, with the keys `item_id` and the side features.

        Returns:
            Item vectors, [X, D].
        """
        return self.rows(features).vectors_XD

    def rows(self, features: KeyedJaggedTensor) -> ItemRows:
        """Looks up item vectors and, in the same lookup, the rows of the id table.

        Args:
            features: As in `forward`.

        Returns:
            Both, [X, D] each.
        """
        rows = self.ebc(features)
        if not self.pools:
            # Not unpacked: symbolic tracing does not know how many there are.
            pooled = pool(rows, self.feature_names, self.id_features)
            return ItemRows(vectors_XD=pooled[0], ids_XD=pooled[1])
        ids_XD = rows[self.id_features[0]]
        for name in self.id_features[1:]:
            ids_XD = ids_XD + rows[name]
        return ItemRows(vectors_XD=self._sum(rows.values()), ids_XD=ids_XD)

    def id_table(self) -> Tensor | None:
        """The table of ids, float32 [V, D]; None where it is sharded, quantized or not a table of its own."""
        if type(self.ebc) is not EmbeddingBagCollection or len(self.id_features) > 1:
            return None
        tables = {config.name: config for config in self.ebc.embedding_bag_configs()}
        for name, config in tables.items():
            if config.feature_names == self.id_features:
                weight = self.ebc.embedding_bags[name].weight.detach()
                return weight if weight.dtype == torch.float32 and weight.is_contiguous() else None
        return None

    def free(self) -> None:
        """Frees the memory of the tables, which cannot be looked up any more."""
        del self.ebc

    def _sum(self, pooled_XFD: Tensor) -> Tensor:
        # A sharded collection may order features differently, which a sum does not depend on.
        if len(self.feature_names) == 1:
            return pooled_XFD
        return pooled_XFD.unflatten(1, (len(self.feature_names), self.dim)).sum(dim=1)


def _new_collection(
    num_items: int, num_embeddings: Mapping[str, int], dim: int, device: torch.device | None
) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        device=device,
        tables=[
            EmbeddingBagConfig(
                name=name,
                feature_names=[name],
                num_embeddings=rows,
                embedding_dim=dim,
                # The mean keeps the scale independent of an item's number of categories.
                pooling=PoolingType.SUM if name == ITEM_ID else PoolingType.MEAN,
            )
            for name, rows in {ITEM_ID: num_items, **num_embeddings}.items()
        ],
    )
