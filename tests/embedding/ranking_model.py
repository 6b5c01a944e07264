"""A ranking model as another team might write it: its own tables, its own dense part, and a place for our sessions.

Its traffic is made up. Every session ends in `a, b, y` or in `b, a, y`: a of one family of items, b of another, y and
all clicks before of a third. The user clicks where the family of the click before the last is that of the request's
context. So neither the request nor the bag of clicked items nor the last click says anything: only the edges of the
graph do.

Shapes: B requests, L clicks, X dense features.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from llmgr_rec import (
    Catalog,
    Collator,
    EncoderConfig,
    ItemTables,
    RawSessions,
    SessionBatch,
    SessionRecommender,
    build_encoder,
)

FAMILY = 8
NUM_ITEMS = 3 * FAMILY
NUM_USERS, NUM_CONTEXTS, NUM_DENSE = 50, 2, 4
OWN_DIM, SESSION_DIM = 8, 16
MOST_EARLIER_CLICKS = 3


@dataclass
class RankingBatch(Pipelineable):
    """The other team's batch; the sessions travel in it as one more part."""

    dense_BX: Tensor
    sparse: KeyedJaggedTensor
    session: SessionBatch
    clicked_B: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        return replace(self, **{name: part.to(device, non_blocking=non_blocking) for name, part in vars(self).items()})

    def pin_memory(self) -> Self:
        return replace(self, **{name: part.pin_memory() for name, part in vars(self).items()})

    def record_stream(self, stream: torch.Stream) -> None:
        for part in vars(self).values():
            part.record_stream(stream)


class RankingModel(nn.Module):
    """Predicts a click from dense features, the user, the context and, where it is given, the session."""

    def __init__(self, session: SessionRecommender | None) -> None:
        super().__init__()
        sizes = {"user_id": NUM_USERS, "context": NUM_CONTEXTS}
        self.sparse_arch = EmbeddingBagCollection(
            device=torch.device("meta"),
            tables=[
                EmbeddingBagConfig(name=f"t_{name}", feature_names=[name], num_embeddings=rows, embedding_dim=OWN_DIM)
                for name, rows in sizes.items()
            ],
        )
        self.session = session
        self.dense_arch = nn.Sequential(nn.Linear(NUM_DENSE, OWN_DIM), nn.ReLU())
        width = OWN_DIM * (1 + len(sizes)) + (SESSION_DIM if session is not None else 0)
        self.over_arch = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, batch: RankingBatch) -> tuple[Tensor, Tensor]:
        parts = [self.dense_arch(batch.dense_BX), self.sparse_arch(batch.sparse).values()]
        if self.session is not None:
            parts.append(self.session.encode(batch.session.features, batch.session.graph).sessions_BD)
        logits_B = self.over_arch(torch.cat(parts, dim=1)).squeeze(1)
        loss = functional.binary_cross_entropy_with_logits(logits_B, batch.clicked_B)
        return loss, loss.detach()


def session_part() -> SessionRecommender:
    """Our part of the model, put together from its pieces."""
    tables = ItemTables(NUM_ITEMS, {}, SESSION_DIM, torch.device("meta"))
    return SessionRecommender(tables, build_encoder(EncoderConfig(dropout=0.0), SESSION_DIM), "dot", 1.0)


def own_collator() -> Collator:
    """Collates sessions of the made-up items, which have no side features."""
    ids = pa.array(range(NUM_ITEMS))
    return Collator(Catalog(Path("items.parquet"), ids, torch.ones(NUM_ITEMS, dtype=torch.int64)))


def traffic(
    step: int, rank: int, world_size: int, collator: Collator, size: int = 256, edges: bool = True
) -> RankingBatch:
    """A rank's share of the global batch of a step; no request ever comes again.

    Args:
        step: Number of the global batch.
        rank: This rank.
        world_size: Ranks.
        collator: Makes the sessions' part.
        size: Requests of the global batch; a multiple of the ranks, so that the mean over ranks is that over requests.
        edges: Whether the session graphs keep their edges.
    """
    generator = torch.Generator().manual_seed(step)

    def draw(most: int, *shape: int) -> Tensor:
        return torch.randint(most, (size, *shape), generator=generator)[rank::world_size]

    swapped_B, context_B, user_B = draw(2), draw(NUM_CONTEXTS), draw(NUM_USERS)
    a_B, b_B = draw(FAMILY), FAMILY + draw(FAMILY)
    middle_B2 = torch.where(swapped_B.bool().unsqueeze(1), torch.stack([b_B, a_B], 1), torch.stack([a_B, b_B], 1))
    other_BL = 2 * FAMILY + draw(FAMILY, MOST_EARLIER_CLICKS + 1)
    earlier_B = draw(MOST_EARLIER_CLICKS + 1)
    clicks_BL = torch.cat([other_BL[:, 1:], middle_B2, other_BL[:, :1]], dim=1)
    kept_BL = torch.arange(clicks_BL.shape[1]) >= MOST_EARLIER_CLICKS - earlier_B.unsqueeze(1)
    session = collator(raw_sessions(clicks_BL[kept_BL], kept_BL.sum(1)))
    if not edges:
        none_E = torch.zeros(0, dtype=torch.int64)
        graph = replace(session.graph, edge_src_E=none_E, edge_dst_E=none_E, edge_count_E=none_E)
        session = replace(session, graph=graph)
    ones_2B = torch.ones(2 * len(user_B), dtype=torch.int64)
    return RankingBatch(
        dense_BX=torch.randn(size, NUM_DENSE, generator=generator)[rank::world_size],
        sparse=KeyedJaggedTensor.from_lengths_sync(["user_id", "context"], torch.cat([user_B, context_B]), ones_2B),
        session=session,
        clicked_B=(swapped_B != context_B).float(),
    )


def raw_sessions(items_L: Tensor, lengths_B: Tensor) -> RawSessions:
    """Sessions without targets, as one has them when a request comes in."""
    none_B = torch.full_like(lengths_B, -1)
    return RawSessions(
        items_L=items_L,
        offsets_B1=torch.cat([lengths_B.new_zeros(1), lengths_B.cumsum(0)]),
        targets_B=none_B,
        weights_B=torch.ones(len(lengths_B)),
        rows_B=none_B,
        global_size=len(lengths_B),
    )
