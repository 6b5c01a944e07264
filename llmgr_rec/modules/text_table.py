"""The table of what a language model makes of item texts: one frozen row per item."""

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from llmgr_rec.data.collate import ITEM_ID

# Name of the table.
ITEM_TEXT = "item_text"


def text_tables(num_items: int, width: int, device: torch.device | None = None) -> EmbeddingBagCollection:
    """The frozen table of text encodings, one row per item, looked up by the bags under `item_id`.

    Args:
        num_items: Size V of the catalog.
        width: Columns of a row.
        device: Where the table is made; `meta` leaves the memory to the sharder.
    """
    return EmbeddingBagCollection(
        device=device,
        tables=[
            EmbeddingBagConfig(
                name=ITEM_TEXT,
                feature_names=[ITEM_ID],
                num_embeddings=num_items,
                embedding_dim=width,
                pooling=PoolingType.SUM,
            )
        ],
    )
