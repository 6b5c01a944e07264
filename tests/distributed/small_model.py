"""A small model with a trained and a frozen embedding collection, shared by the tests of this folder."""

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.config import TablesConfig
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.sharding import shard
from llmgr_rec.storage.table_io import init_tables, local_shards

NUM_ITEMS, NUM_CATEGORIES, DIM, TEXT_DIM = 103, 11, 16, 24


def collection(sizes: dict[str, int], dim: int, features: dict[str, str], device: str) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        device=torch.device(device),
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=rows,
                embedding_dim=dim,
                feature_names=[features[name]],
                pooling=PoolingType.MEAN,
            )
            for name, rows in sizes.items()
        ],
    )


class SmallModel(nn.Module):
    """Item tables that may train, frozen text tables, a trained and a frozen linear layer."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        keys = {"item_id": "item_id", "category": "category", "item_text": "item_id"}
        self.item_tables = collection({"item_id": NUM_ITEMS, "category": NUM_CATEGORIES}, DIM, keys, device)
        self.text_tables = collection({"item_text": NUM_ITEMS}, TEXT_DIM, keys, device)
        torch.manual_seed(5)
        self.encoder = nn.Linear(DIM, 4)
        self.base = nn.Linear(TEXT_DIM, 4).requires_grad_(False)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        items = self.item_tables(features).to_dict()
        with torch.no_grad():
            texts = self.text_tables(features).to_dict()["item_id"]
        scores = self.encoder(items["item_id"] + items["category"]) + self.base(texts)
        return (scores - 1).pow(2).mean()


def is_trained(name: str) -> bool:
    return "item_tables" in name


def sharded_model(world: World, tables: TablesConfig, seed: int = 3) -> DistributedModelParallel:
    model = shard(SmallModel("meta"), tables, world, is_trained)
    init_tables(model, seed, 0.1)
    return model


def batch(step: int, world: World, bags: int = 12) -> KeyedJaggedTensor:
    """This rank's share of a global batch that depends only on the step."""
    generator = torch.Generator().manual_seed(100 + step)
    items = torch.randint(NUM_ITEMS, (bags,), generator=generator)
    counts = torch.randint(3, (bags,), generator=generator)
    categories = torch.randint(NUM_CATEGORIES, (bags, 2), generator=generator)
    mine = range(world.rank * bags // world.size, (world.rank + 1) * bags // world.size)
    values = torch.cat([items[mine.start : mine.stop]] + [categories[row, : counts[row]] for row in mine])
    lengths = torch.cat([torch.ones(len(mine), dtype=torch.int64), counts[mine.start : mine.stop]])
    return KeyedJaggedTensor.from_lengths_sync(["item_id", "category"], values, lengths)


def shard_list(module: nn.Module) -> list[tuple[str, int, int, Tensor]]:
    return [(s.parameter, s.row_offset, s.col_offset, s.tensor.clone()) for s in local_shards(module)]


def assemble(per_rank: list[list[tuple[str, int, int, Tensor]]]) -> dict[str, Tensor]:
    """Puts the shards of all ranks together into whole tables; every element must come from exactly one shard."""
    pieces = [piece for rank in per_rank for piece in rank]
    tables = {}
    for name in {name for name, *_ in pieces}:
        own = [(row, col, tensor) for other, row, col, tensor in pieces if other == name]
        rows = max(row + tensor.shape[0] for row, _, tensor in own)
        cols = max(col + tensor.shape[1] for _, col, tensor in own)
        assert sum(tensor.numel() for *_, tensor in own) == rows * cols
        whole = torch.full((rows, cols), float("nan"), dtype=own[0][2].dtype)
        for row, col, tensor in own:
            whole[row : row + tensor.shape[0], col : col + tensor.shape[1]] = tensor
        assert not whole.isnan().any()
        tables[name] = whole
    return tables
