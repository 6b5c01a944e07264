"""The table of text embeddings of the items by a language model: one frozen row per item."""

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from llmgr_rec.data.collate import ITEM_ID

ITEM_TEXT = "item_text"


def text_tables(num_items: int, width: int, device: torch.device | None = None) -> EmbeddingBagCollection:
    """The frozen table of text embeddings, one row per item, looked up by the key `item_id`.

    Args:
        num_items: Size V of the catalog.
        width: Width of an embedding, in columns.
        device: Device of the table; on `meta` the sharder allocates it.
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
