"""Item tables of another team, in each kind of collection, with the team's names; clicks and shown items share one."""

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

from tests.small_run import NUM_ITEMS

NUM_CATEGORIES, DIM = 4, 16


def bag_configs(prefix: str) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name=f"{prefix}_item", feature_names=["clicks", "items"], num_embeddings=NUM_ITEMS, embedding_dim=DIM
        ),
        EmbeddingBagConfig(
            name=f"{prefix}_category",
            feature_names=["category"],
            num_embeddings=NUM_CATEGORIES,
            embedding_dim=DIM,
            pooling=PoolingType.MEAN,
        ),
    ]


def bag_collection(device: torch.device) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(tables=bag_configs("bag"), device=device)


def fused_collection(device: torch.device) -> FusedEmbeddingBagCollection:
    return FusedEmbeddingBagCollection(
        tables=bag_configs("fused"), optimizer_type=torch.optim.SGD, optimizer_kwargs={"lr": 0.1}, device=device
    )


def sequence_collection(device: torch.device) -> EmbeddingCollection:
    tables = [
        EmbeddingConfig(
            name=config.name,
            feature_names=config.feature_names,
            num_embeddings=config.num_embeddings,
            embedding_dim=DIM,
        )
        for config in bag_configs("sequence")
    ]
    return EmbeddingCollection(tables=tables, device=device)
