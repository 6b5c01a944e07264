"""A session recommender as one part of a larger TorchRec ranking model: docs/embedding.md explains this program.

    torchrun --standalone --nproc_per_node 2 -m examples.rank_with_sessions --run_folder runs/shop --output runs/joint

Shapes: B requests, L clicks, X dense features, C shown items (one per request), D columns.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

import llmgr_rec as rec

NUM_USERS, NUM_DENSE, STEPS = 1000, 4, 100


@dataclass
class Requests(Pipelineable):
    """The batch of the ranking model."""

    dense_BX: Tensor
    sparse: KeyedJaggedTensor
    session: rec.SessionBatch
    clicked_B: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Requests":
        """The same batch on another device."""
        return Requests(**{name: part.to(device, non_blocking=non_blocking) for name, part in vars(self).items()})

    def pin_memory(self) -> "Requests":
        """The same batch in page-locked memory."""
        return Requests(**{name: part.pin_memory() for name, part in vars(self).items()})

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory from reuse until `stream` has done its work."""
        for part in vars(self).values():
            part.record_stream(stream)


def session_batch(collator: rec.Collator, clicks_L: Tensor, lengths_B: Tensor, shown_B: Tensor) -> rec.SessionBatch:
    """The clicks before each request, oldest first, and the item that the request shows."""
    raw = rec.RawSessions(
        items_L=clicks_L,
        offsets_B1=torch.cat([torch.zeros(1, dtype=torch.int64), lengths_B.cumsum(0)]),
        targets_B=shown_B,
        weights_B=torch.ones(len(shown_B)),
        rows_B=torch.arange(len(shown_B)),
        global_size=len(shown_B),
    )
    batch = collator(raw)
    # One bag for each node of the session graphs, then one for each shown item: one lookup for all.
    bags = collator.item_features(torch.cat([batch.graph.node_items_N, shown_B]))
    return replace(batch, features=bags, candidates_C=shown_B)


class Ranker(nn.Module):
    """Predicts whether the user clicks the shown item."""

    def __init__(self, session: rec.SessionRecommender) -> None:
        super().__init__()
        users = EmbeddingBagConfig(name="users", feature_names=["user_id"], num_embeddings=NUM_USERS, embedding_dim=16)
        self.sparse_arch = EmbeddingBagCollection(tables=[users], device=torch.device("meta"))
        self.session = session
        width = 16 + NUM_DENSE + session.item_tables.dim + 1
        self.over_arch = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, batch: Requests) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the clicks, twice: the pipeline calls backward on the first and returns the second."""
        users_BD = self.sparse_arch(batch.sparse).values()
        output = self.session(batch.session)
        score_B1 = (output.queries_BQ * output.candidates_CQ).sum(dim=1, keepdim=True)
        parts = [users_BD, batch.dense_BX, output.sessions_BD, score_B1]
        logits_B = self.over_arch(torch.cat(parts, dim=1)).squeeze(1)
        loss = functional.binary_cross_entropy_with_logits(logits_B, batch.clicked_B)
        return loss, loss.detach()


def requests(collator: rec.Collator, rank: int, size: int = 64) -> Iterator[Requests]:
    """Synthetic requests in place of your data: users click an item again that they have just clicked."""
    draw = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        lengths_B = torch.randint(1, 6, (size,), generator=draw)
        clicks_L = torch.randint(collator.num_items, (int(lengths_B.sum()),), generator=draw)
        clicked_B = torch.randint(2, (size,), generator=draw)
        other_B = torch.randint(collator.num_items, (size,), generator=draw)
        users_B = torch.randint(NUM_USERS, (size,), generator=draw)
        shown_B = torch.where(clicked_B == 1, clicks_L[lengths_B.cumsum(0) - 1], other_B)
        yield Requests(
            dense_BX=torch.randn(size, NUM_DENSE, generator=draw),
            sparse=KeyedJaggedTensor(["user_id"], users_B, lengths=torch.ones_like(users_B)),
            session=session_batch(collator, clicks_L, lengths_B, shown_B),
            clicked_B=clicked_B.float(),
        )


def train(run: Path, output: Path, world: rec.World) -> list[float]:
    """Trains the ranking model with the session recommender of a run in it; returns the losses of this rank."""
    bundle = run / "export" / "sbr"
    config, catalog = rec.load_config(bundle / "config.yaml"), rec.Catalog.load(bundle)
    collator = rec.Collator(catalog, config.tables.side_features)
    torch.manual_seed(0)
    session = rec.build_recommender(config, catalog.num_items, catalog.num_embeddings, "meta")
    model = rec.shard(Ranker(session), rec.TablesConfig(lr=0.05), world, trained=lambda table: True)
    rec.init_tables(model, seed=0, std=0.1)
    assert rec.load_weights(session, bundle) == []
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    adamw = KeyedOptimizerWrapper(dense, lambda weights: torch.optim.AdamW(weights, lr=3e-3))
    optimizer = CombinedOptimizer([("tables", model.fused_optimizer), ("dense", adamw)])
    pipeline = TrainPipelineSparseDist(model, optimizer, world.device)
    model.train()
    batches = requests(collator, world.rank)
    losses = [float(pipeline.progress(batches)) for _ in range(STEPS)]
    # Both collections of tables are looked up ahead; otherwise TorchRec says so in its log only.
    assert len(pipeline._pipelined_modules) == 2
    pipeline.detach()
    # The session recommender as a bundle of its own, with what it has learned in the ranking model.
    rec.export_bundle(model, "sbr", config, catalog, output / "export" / "sbr", world)
    return losses


def main(argv: Sequence[str]) -> None:
    """Parses the arguments, trains and prints the loss."""
    parser = argparse.ArgumentParser(description="Trains a ranking model with a session recommender in it.")
    parser.add_argument("--run_folder", type=Path, required=True, help="run folder of llmgr_rec.train")
    parser.add_argument("--output", type=Path, required=True, help="run folder to make")
    arguments = parser.parse_args(argv)
    world = rec.init_distributed("cpu", timeout_s=600)
    losses = train(arguments.run_folder, arguments.output, world)
    if world.rank == 0:
        print(f"loss {sum(losses[:5]) / 5:.3f} in the first steps, {sum(losses[-5:]) / 5:.3f} in the last")
    rec.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
