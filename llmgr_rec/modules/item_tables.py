"""Item tables: vectors of items from their ids and side features, by one TorchRec EmbeddingBagCollection.

Shapes: X bags (one per item occurrence: the nodes of a batch, then its candidates), F features, D = d1 columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.data.collate import ITEM_ID


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
    """

    def __init__(
        self, num_items: int, num_embeddings: dict[str, int], dim: int, device: torch.device | None = None
    ) -> None:
        super().__init__()
        sizes = {ITEM_ID: num_items, **num_embeddings}
        self.num_items = num_items
        self.dim = dim
        self.feature_names = list(sizes)
        self.ebc = EmbeddingBagCollection(
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
                for name, rows in sizes.items()
            ],
        )

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Looks up item vectors.

        Args:
            features: A bag of ids for each of the X occurrences, with the keys `item_id` and the side features.

        Returns:
            Item vectors, [X, D].
        """
        return self._sum(self.ebc(features).values())

    def rows(self, features: KeyedJaggedTensor) -> ItemRows:
        """Looks up item vectors and, in the same lookup, the rows of the id table.

        Args:
            features: As in `forward`.

        Returns:
            Both, [X, D] each.
        """
        pooled = self.ebc(features)
        return ItemRows(vectors_XD=self._sum(pooled.values()), ids_XD=pooled[ITEM_ID])

    def _sum(self, pooled_XFD: Tensor) -> Tensor:
        # A sharded collection may order features differently, which a sum does not depend on.
        if len(self.feature_names) == 1:
            return pooled_XFD
        return pooled_XFD.unflatten(1, (len(self.feature_names), self.dim)).sum(dim=1)
