"""A session recommender on TorchRec, from Parquet files to HR@20, in one file.

    python -m examples.minimal
    torchrun --standalone --nproc_per_node 2 -m examples.minimal

It shows the whole training path. Sessions are read in batches of graphs; item tables are made on the meta device,
sharded across the ranks and updated by a fused optimizer; a session encoder turns the rows of the clicked items into
session vectors; TrainPipelineSparseDist looks up the rows of the next batch during a step; the whole catalog is ranked.

Shapes: B sessions, N nodes of the session graphs, V items, X = N + V bags, D columns.
"""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import llmgr_rec as rec
from llmgr_rec import ranking_loss

NUM_ITEMS, NUM_CATEGORIES, DIM = 400, 20, 32
NUM_SESSIONS, EPOCHS, BATCH_SIZE = 600, 3, 128
# The pipeline traces `forward` symbolically and does not enter this function.
torch.fx.wrap("ranking_loss")


def write_sessions(file: Path, count: int, seed: int) -> Path:
    """Random walks: in four steps of five the next item is one of four successors of the last, else any item."""
    successors = np.random.default_rng(0).integers(NUM_ITEMS, size=(NUM_ITEMS, 4))
    rng = np.random.default_rng(seed)
    walks = [rng.integers(NUM_ITEMS, size=count)]
    for _ in range(8):
        successor = successors[walks[-1], rng.integers(4, size=count)]
        walks.append(np.where(rng.random(count) < 0.8, successor, rng.integers(NUM_ITEMS, size=count)))
    clicks = np.stack(walks, axis=1)
    pq.write_table(pa.table({"items": list(clicks[:, :-1]), "target": clicks[:, -1]}), file)
    return file


def make_catalog() -> rec.Catalog:
    """Items with one category each. The catalog of a prepared data set is loaded by `Catalog.load(folder)`."""
    ones_V = torch.ones(NUM_ITEMS, dtype=torch.int64)
    categories = rec.Jagged.from_lengths(torch.arange(NUM_ITEMS) % NUM_CATEGORIES, ones_V)
    return rec.Catalog(Path("items.parquet"), pa.array(range(NUM_ITEMS)), ones_V, {"category": categories})


class NextItemModel(nn.Module):
    """Scores each item as the next one of a session by the dot product of session vector and item vector."""

    def __init__(self, tables: rec.ItemTables, encoder: rec.SessionEncoder, world_size: int) -> None:
        super().__init__()
        self.tables = tables
        self.encoder = encoder
        self.world_size = world_size

    def forward(self, batch: rec.SessionBatch) -> tuple[Tensor, Tensor]:
        """The loss of a batch, twice: the pipeline calls backward on the first and returns the second."""
        sessions_BD, items_VD = self.encode(batch)
        # Softmax cross-entropy over the catalog, averaged over the sessions of all ranks.
        loss = ranking_loss(
            sessions_BD, items_VD, batch.target_columns_B, batch.weights_B, batch.global_size, self.world_size
        )
        return loss, loss.detach()

    def encode(self, batch: rec.SessionBatch) -> tuple[Tensor, Tensor]:
        """Session vectors [B, D] and item vectors [V, D] of a batch."""
        # One lookup: a bag of ids for each node of the session graphs, then one for each item of the catalog.
        vectors_XD = self.tables(batch.features)
        num_nodes = batch.graph.node_items_N.shape[0]
        nodes_ND, items_VD = vectors_XD.split([num_nodes, vectors_XD.shape[0] - num_nodes])
        return self.encoder(nodes_ND, batch.graph).sessions_BD, items_VD

    def item_vectors(self, features: KeyedJaggedTensor) -> Tensor:
        """Item vectors, one per bag, [X, D]; called by the catalog ranker."""
        return self.tables(features)


def shard(model: NextItemModel, world: rec.World) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Shards the tables across the ranks, replicates the encoder, and makes the optimizer of both."""
    # The optimizer of a table runs inside its backward pass; gradients of tables are never stored.
    apply_optimizer_in_backward(torch.optim.Adagrad, model.tables.parameters(), {"lr": 0.2})
    constraint = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])
    planner = EmbeddingShardingPlanner(constraints=dict.fromkeys(model.tables.feature_names, constraint))
    sharded = DistributedModelParallel(model, device=world.device, plan=planner.collective_plan(model))
    # The tables were on the meta device; these initial rows are the same on any number of ranks.
    rec.init_tables(sharded, seed=0, std=0.1)
    dense = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    adamw = KeyedOptimizerWrapper(dense, lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
    return sharded, CombinedOptimizer([("tables", sharded.fused_optimizer), ("dense", adamw)])


@torch.no_grad()
def hit_rate(model: NextItemModel, collator: rec.Collator, reader: rec.SessionReader, world: rec.World) -> float:
    """HR@20: the share of sessions whose next item is among the best 20 of the whole catalog."""
    ranker, hits_2 = rec.CatalogRanker(model.eval(), collator, world), torch.zeros(2)
    for batch in reader.batches(epoch=0):
        top_BK, _ = ranker.rank(model.encode(batch)[0], k=20)
        hit_B = (top_BK == batch.targets_B.unsqueeze(1)).any(dim=1)
        hits_2 += torch.stack([(hit_B * batch.weights_B).sum(), batch.weights_B.sum()])
    dist.all_reduce(hits_2)
    return float(hits_2[0] / hits_2[1])


def main() -> None:
    """Trains and evaluates. Each rank writes the same files to a folder of its own and reads its part of each batch."""
    world = rec.init_distributed("cpu", timeout_s=60, threads=1)
    collator = rec.Collator(make_catalog(), ["category"], rec.CandidateItems("full"))
    with tempfile.TemporaryDirectory() as folder:
        files = [write_sessions(Path(folder) / f"{seed}.parquet", NUM_SESSIONS, seed) for seed in (1, 2)]
        orders = [rec.SamplingOrder(BATCH_SIZE, shuffle=True, augment_prefixes=True), rec.SamplingOrder(BATCH_SIZE)]
        part = rec.DataShard(world.rank, world.size)
        train, test = (
            rec.SessionReader([file], num_items=NUM_ITEMS, collate=collator, order=order, shard=part)
            for file, order in zip(files, orders, strict=True)
        )
        torch.manual_seed(0)
        tables = rec.ItemTables(NUM_ITEMS, {"category": NUM_CATEGORIES}, DIM, torch.device("meta"))
        model = NextItemModel(tables, rec.build_encoder(rec.EncoderConfig(name="srgnn", dropout=0.0), DIM), world.size)
        sharded, optimizer = shard(model, world)
        pipeline = TrainPipelineSparseDist(sharded, optimizer, world.device)
        for epoch in range(EPOCHS):
            sharded.train()
            batches = train.batches(epoch)
            loss = torch.stack([pipeline.progress(batches) for _ in range(train.steps_per_epoch)]).mean() / world.size
            dist.all_reduce(loss)
            if world.rank == 0:
                print(f"epoch {epoch + 1}: loss {float(loss):.3f}")
        pipeline.detach()
        rate = hit_rate(model, collator, test, world)
    if world.rank == 0:
        print(f"HR@20 {rate:.3f} (random ranking: {20 / NUM_ITEMS:.3f})")
    rec.shutdown()


if __name__ == "__main__":
    main()
