"""Item text in the session recommender: a frozen table of text encodings, and their part in item vectors.

Shapes: X bags, D = d1 columns of item vectors, H = d2 hidden width of the language model that made the encodings.
"""

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.data.collate import ITEM_TEXT


def text_tables(
    num_items: int, width: int, device: torch.device | None = None, key: str = ITEM_TEXT
) -> EmbeddingBagCollection:
    """The frozen table of text encodings: a row an item.

    Args:
        num_items: Size V of the catalogue.
        width: Columns H of an encoding.
        device: Where the table is made; `meta` leaves the memory to the sharder.
        key: Key of the bags that it is looked up by.
    """
    return EmbeddingBagCollection(
        device=device,
        tables=[
            EmbeddingBagConfig(
                name=ITEM_TEXT,
                feature_names=[key],
                num_embeddings=num_items,
                embedding_dim=width,
                pooling=PoolingType.SUM,
            )
        ],
    )


class ItemText(nn.Module):
    """Reads item texts: their encodings, and what these add to item vectors, if anything.

    The encodings have a root mean square norm of 1, so the projection starts where an item's text weighs as much as a
    row of the item tables.

    Args:
        num_items: Size V of the catalogue.
        width: Columns H of an encoding.
        dim: Columns D of item vectors; 0 adds nothing to them.
        std: Standard deviation of the initial rows of the item tables.
        device: Where the table is made; `meta` leaves the memory to the sharder.
    """

    def __init__(self, num_items: int, width: int, dim: int, std: float, device: torch.device | None = None) -> None:
        super().__init__()
        # First, because a table draws random numbers where it is not on meta.
        self.text_projection = nn.Linear(width, dim, bias=False) if dim else None
        if self.text_projection is not None:
            nn.init.normal_(self.text_projection.weight, std=std)
        self.text_tables = text_tables(num_items, width, device)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Looks up text encodings, without gradient.

        Args:
            features: A bag for each of the X occurrences, under `item_text`.

        Returns:
            Encodings, [X, H].
        """
        with torch.no_grad():
            return self.text_tables(features).values()

    def add_to(self, vectors_XD: Tensor, texts_XH: Tensor) -> Tensor:
        """Item vectors with their texts, [X, D].

        Args:
            vectors_XD: Item vectors from the item tables.
            texts_XH: Text encodings of the same items.
        """
        return vectors_XD if self.text_projection is None else vectors_XD + self.text_projection(texts_XH)
