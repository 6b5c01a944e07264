"""Checks on several ranks that lists merged from shards of the catalog equal those of the whole catalog.

```sh
python -m torch.distributed.run --standalone --nproc_per_node=2 -m benchmarks.topk_ranks ITEMS DIM QUERIES K
```
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.distributed.process_group import init_distributed, shutdown
from llmgr_rec.distributed.ranking import CatalogRanker
from llmgr_rec.kernels.topk import top_k


@dataclass
class _Vectors:
    """Given item vectors in place of a model and its collator."""

    items_RQ: Tensor
    num_items: int

    def item_features(self, items_X: Tensor) -> KeyedJaggedTensor:
        return KeyedJaggedTensor(keys=["item_id"], values=items_X, lengths=torch.ones_like(items_X))

    def item_vectors(self, features: KeyedJaggedTensor) -> Tensor:
        return self.items_RQ[features.values()]


def main(argv: Sequence[str]) -> None:
    """Ranks on all ranks together and on this one alone, and compares the lists exactly.

    Raises:
        RuntimeError: The lists differ.
    """
    items, dim, queries, k = map(int, argv)
    world = init_distributed("cpu", timeout_s=60, threads=1)
    try:
        # Small integers: products are exact, and many scores are equal.
        generator = torch.Generator().manual_seed(1)
        items_RQ = torch.randint(-3, 4, (items, dim), generator=generator).float()
        queries_BQ = torch.randint(-3, 4, (queries, dim), generator=generator).float()[world.rank :: world.size]
        vectors = _Vectors(items_RQ, items)
        merged = CatalogRanker(vectors, vectors, world).rank(queries_BQ, k)
        if not all(map(torch.equal, merged, top_k(queries_BQ, items_RQ, k))):
            raise RuntimeError(f"rank {world.rank}: merged lists differ from those of the whole catalog")
    finally:
        shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
