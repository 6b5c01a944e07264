"""Item tables: the ids and side features of items become vectors through one EmbeddingBagCollection.

Shapes: X bags (one an item occurrence: the nodes of a batch, then its candidates), F features, D = d1 columns.
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
    """Vectors of a list of item occurrences.

    Args:
        vectors_XD: Item vectors: the id row plus the pooled rows of every side feature.
        ids_XD: The rows of the id table alone.
        texts_XH: Rows of the table of text encodings, where the model has one.
    """

    vectors_XD: Tensor
    ids_XD: Tensor
    texts_XH: Tensor | None = None


class ItemTables(nn.Module):
    """One bag an item: its id row plus the mean of its category rows, of its brand rows and so on.

    A single EmbeddingBagCollection holds every table, so the planner shards them together and a training pipeline
    finds one module to overlap. Nothing but attribute access stands before the lookup, which is what the pipeline's
    tracing needs.

    Args:
        num_items: Rows of the item table.
        num_embeddings: Rows of each side-feature table, by the feature's name (the key in the batch).
        dim: Columns of every table.
        device: Where the tables are made; `meta` leaves the memory to the sharder.
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
                    # An item has one id, but any number of categories: their mean keeps items of many comparable.
                    pooling=PoolingType.SUM if name == ITEM_ID else PoolingType.MEAN,
                )
                for name, rows in sizes.items()
            ],
        )

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Looks up item vectors.

        Args:
            features: A bag of ids for each of the X occurrences, under `item_id` and the side features' names.

        Returns:
            Item vectors, [X, D].
        """
        return self._sum(self.ebc(features).values())

    def rows(self, features: KeyedJaggedTensor) -> ItemRows:
        """Looks up item vectors and, from the same lookup, the bare rows of the id table.

        Args:
            features: As in `forward`.

        Returns:
            Both kinds of vectors, [X, D] each.
        """
        pooled = self.ebc(features)
        return ItemRows(vectors_XD=self._sum(pooled.values()), ids_XD=pooled[ITEM_ID])

    def _sum(self, pooled_XFD: Tensor) -> Tensor:
        # A sharded collection may return its features in another order; the sum does not depend on it.
        if len(self.feature_names) == 1:
            return pooled_XFD
        return pooled_XFD.unflatten(1, (len(self.feature_names), self.dim)).sum(dim=1)
