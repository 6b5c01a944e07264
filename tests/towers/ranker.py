"""A ranking model as another team writes it: a DLRM over impressions, with one of our towers as a part of it.

Nothing in it is ours but the tower. A request shows some items to a session; each of them is an impression, a row.

Shapes: B sessions, C impressions, X dense features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn, optim
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.nn import functional
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

NUM_USERS, NUM_DENSE, USER_DIM = 30, 3, 8


@dataclass
class Impressions(Pipelineable):
    """Sessions with what they show, and a row for each impression of everything else."""

    dense_CX: Tensor
    users: KeyedJaggedTensor
    sessions: KeyedJaggedTensor
    clicked_C: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        return type(self)(**{name: part.to(device, non_blocking=non_blocking) for name, part in vars(self).items()})

    def pin_memory(self) -> Self:
        return type(self)(**{name: part.pin_memory() for name, part in vars(self).items()})

    def record_stream(self, stream: torch.Stream) -> None:
        for part in vars(self).values():
            part.record_stream(stream)


class Ranker(nn.Module):
    """Predicts the click of an impression from dense features, the user and the outputs of towers."""

    def __init__(self, **towers: Any) -> None:
        super().__init__()
        users = EmbeddingBagConfig(
            name="users", feature_names=["user_id"], num_embeddings=NUM_USERS, embedding_dim=USER_DIM
        )
        self.sparse_arch = EmbeddingBagCollection(tables=[users], device=torch.device("meta"))
        self.towers = nn.ModuleDict(towers)
        width = NUM_DENSE + USER_DIM + sum(sum(tower.dims.values()) for tower in towers.values())
        self.over_arch = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, batch: Impressions) -> tuple[Tensor, dict[str, Tensor]]:
        parts = [batch.dense_CX, self.sparse_arch(batch.users).values()]
        answers = {name: tower(batch.sessions) for name, tower in self.towers.items()}
        parts += [answer.values() for answer in answers.values()]
        logits_C = self.over_arch(torch.cat(parts, dim=1)).squeeze(1)
        loss = functional.binary_cross_entropy_with_logits(logits_C, batch.clicked_C, reduction="sum")
        return loss, {name: answer["score"] for name, answer in answers.items()}


def impressions(seed: int, num_items: int, sessions: int = 8) -> Impressions:
    """Random sessions of 0 to 6 clicks, some on unknown items (-1), each with 0 to 4 impressions."""
    draw = torch.Generator().manual_seed(seed)
    clicks_B = torch.randint(7, (sessions,), generator=draw)
    shown_B = torch.randint(5, (sessions,), generator=draw)
    values = torch.randint(-1, num_items, (int(clicks_B.sum() + shown_B.sum()),), generator=draw)
    count = int(shown_B.sum())
    users_C = torch.randint(NUM_USERS, (count,), generator=draw)
    return Impressions(
        dense_CX=torch.randn(count, NUM_DENSE, generator=draw),
        users=KeyedJaggedTensor(["user_id"], users_C, lengths=torch.ones_like(users_C), stride=count),
        sessions=KeyedJaggedTensor(
            ["clicks", "items"], values, lengths=torch.cat([clicks_B, shown_B]), stride=sessions
        ),
        clicked_C=torch.randint(2, (count,), generator=draw).float(),
    )


def stream(rank: int, num_items: int, steps: int) -> Iterator[Impressions]:
    """A rank's batches; every second batch of the last rank has no session."""
    for step in range(steps):
        yield impressions(100 * step + rank, num_items, 0 if rank and step % 2 else 8)


def shard_as_the_team_does(model: nn.Module, world_size: int) -> Any:
    """TorchRec's planner, sharders and wrapper, with nothing of ours; EmbeddingCollections by row, others by column."""
    import torch.distributed as dist
    from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology

    kinds: dict[str, str] = {}
    for part in model.modules():
        if isinstance(part, EmbeddingBagCollection | EmbeddingCollection):
            for parameter in part.parameters():
                if not hasattr(parameter, "_optimizer_classes"):
                    apply_optimizer_in_backward(optim.Adagrad, [parameter], {"lr": 0.1})
        if isinstance(part, EmbeddingBagCollection | FusedEmbeddingBagCollection):
            kinds |= {table.name: "column_wise" for table in part.embedding_bag_configs()}
        elif isinstance(part, EmbeddingCollection):
            kinds |= {table.name: "row_wise" for table in part.embedding_configs()}
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world_size, compute_device="cpu", local_world_size=world_size),
        constraints={
            name: ParameterConstraints(sharding_types=[kind], min_partition=4, compute_kernels=["fused"])
            for name, kind in kinds.items()
        },
    )
    sharders = get_default_sharders()
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


def optimizer_of(model: Any) -> Any:
    """Fused optimizers of the tables and AdamW of the rest."""
    from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
    from torchrec.optim.optimizers import in_backward_optimizer_filter

    dense = {n: p for n, p in in_backward_optimizer_filter(model.named_parameters()) if p.requires_grad}
    adamw = KeyedOptimizerWrapper(dense, lambda parameters: optim.AdamW(parameters, lr=1e-2))
    return CombinedOptimizer([("tables", model.fused_optimizer), ("dense", adamw)])
