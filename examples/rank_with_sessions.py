"""A ranking model with and without the session recommender of a run in it: docs/embedding.md explains this program.

    torchrun --standalone --nproc_per_node 2 -m examples.rank_with_sessions --dataset shop --run_folder runs/shop

Shapes: B requests, C impressions (items that the requests show), D columns.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.functional.classification import binary_auroc
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed import DistributedModelParallel, EvalPipelineSparseDist, TrainPipelineSparseDist
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.streamable import Pipelineable

from llmgr_rec import SessionTower

DIM, SHOWN, BATCH, CPU = 32, 5, 64, torch.device("cpu")


@dataclass
class Requests(Pipelineable):
    """Requests with the items that they show: a row for each request in `requests`, for each item in `impressions`."""

    requests: KeyedJaggedTensor
    impressions: KeyedJaggedTensor
    clicked_C: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Requests":
        """The same batch on another device."""
        return Requests(*(part.to(device, non_blocking=non_blocking) for part in vars(self).values()))

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory from reuse until `stream` has done its work."""
        for part in vars(self).values():
            part.record_stream(stream)


class Ranker(nn.Module):
    """Predicts clicks from the shown item, the mean of the clicked items, and what the tower says."""

    def __init__(self, num_items: int, tower: SessionTower | None) -> None:
        super().__init__()
        table = EmbeddingBagConfig(num_items, DIM, "shown", feature_names=["item", "history"], pooling=PoolingType.MEAN)
        self.sparse_arch = EmbeddingBagCollection(tables=[table], device=torch.device("meta"))
        self.tower = tower
        width = 3 * DIM + (sum(tower.dims.values()) if tower is not None else 0)
        self.over_arch = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, batch: Requests) -> tuple[Tensor, Tensor]:
        """Loss, for the backward pass of the pipeline, and logits [C]."""
        pooled = self.sparse_arch(batch.impressions)
        parts = [pooled["item"], pooled["history"], pooled["item"] * pooled["history"]]
        parts += [] if self.tower is None else [self.tower(batch.requests).values()]
        logits_C = self.over_arch(torch.cat(parts, dim=1)).squeeze(1)
        return binary_cross_entropy_with_logits(logits_C, batch.clicked_C), logits_C.detach()


def batches(part: Path, seed: int, is_test: bool = False) -> Iterator[Requests]:
    """Requests of a part of a prepared data set: one click of each session, and others that are drawn by popularity."""
    sessions = [[*row["items"], row["target"]] for row in pq.read_table(part).to_pylist()]
    popular, draw = np.concatenate(sessions), np.random.default_rng(seed)
    draw.shuffle(sessions)
    for start in range(0, len(sessions), BATCH):
        history, shown, labels = [], [], []
        for session in sessions[start : start + BATCH]:
            place = len(session) - 1 if is_test else int(draw.integers(1, len(session)))
            others = [item for item in draw.choice(popular, 20 * SHOWN) if item not in session]
            history.append(session[:place])
            shown.append([session[place], *others[: SHOWN - 1]])
            labels += [1.0] + [0.0] * (len(shown[-1]) - 1)
        repeated = [clicks for clicks, items in zip(history, shown, strict=True) for _ in items]
        impressions = features(history=repeated, item=[[item] for items in shown for item in items])
        yield Requests(features(clicks=history, items=shown), impressions, torch.tensor(labels))


def features(**rows: list[list[int]]) -> KeyedJaggedTensor:
    """Rows of ids of each key."""
    lists = [torch.tensor(ids, dtype=torch.int64) for key in rows.values() for ids in key]
    return KeyedJaggedTensor(list(rows), torch.cat(lists), lengths=torch.tensor([len(ids) for ids in lists]))


def shard(model: nn.Module) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Shards all tables by columns, those of the tower as well, and makes the optimizer of tables and dense parts."""
    collections = [part for part in model.modules() if isinstance(part, EmbeddingBagCollection)]
    apply_optimizer_in_backward(optim.Adagrad, [w for part in collections for w in part.parameters()], {"lr": 0.1})
    constraint = ParameterConstraints(sharding_types=["column_wise"], compute_kernels=["fused"], min_partition=16)
    names = [table.name for collection in collections for table in collection.embedding_bag_configs()]
    plan = EmbeddingShardingPlanner(constraints=dict.fromkeys(names, constraint)).collective_plan(model)
    sharded = DistributedModelParallel(model, device=CPU, plan=plan)
    dense = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    adamw = KeyedOptimizerWrapper(dense, lambda parameters: optim.AdamW(parameters, lr=1e-3))
    return sharded, CombinedOptimizer([("tables", sharded.fused_optimizer), ("dense", adamw)])


def run(pipeline: TrainPipelineSparseDist, requests: Sequence[Requests]) -> list[Tensor]:
    """Results of all batches; all ranks need the same number of them."""
    source = iter(requests)
    results = [pipeline.progress(source) for _ in requests]
    pipeline.detach()
    return results


def train_and_test(dataset: Path, bundle: Path | None, epochs: int = 20, output: Path | None = None) -> float:
    """AUC on the test part of a ranking model that was trained with a session recommender in it, or without."""
    torch.manual_seed(dist.get_rank())
    tower = SessionTower.from_bundle(bundle, device="meta") if bundle is not None else None
    model, optimizer = shard(Ranker(pq.read_metadata(dataset / "items.parquet").num_rows, tower))
    if tower is not None and bundle is not None:
        tower.load(bundle)
    seeds = range(dist.get_rank(), epochs * dist.get_world_size(), dist.get_world_size())
    requests = [batch for seed in seeds for batch in batches(dataset / "train", seed)]
    run(TrainPipelineSparseDist(model.train(), optimizer, CPU, pipeline_postproc=True), requests)
    tests = list(batches(dataset / "test", seed=0, is_test=True))
    with torch.no_grad():
        logits = run(EvalPipelineSparseDist(model.eval(), optimizer, CPU, pipeline_postproc=True), tests)
    if tower is not None and output is not None:
        tower.save(output)
    return float(binary_auroc(torch.cat(logits), torch.cat([batch.clicked_C for batch in tests]).int()))


def main(argv: Sequence[str]) -> None:
    """Parses the arguments, trains both models and prints their AUC."""
    parser = argparse.ArgumentParser(description="Trains a ranking model with and without a session recommender in it.")
    parser.add_argument("--dataset", type=Path, required=True, help="prepared data set of the run")
    parser.add_argument("--run_folder", type=Path, required=True, help="run folder of llmgr_rec.train")
    parser.add_argument("--output", type=Path, help="run folder to make, of the recommender as trained in the model")
    args = parser.parse_args(argv)
    dist.init_process_group("gloo")
    aucs = [train_and_test(args.dataset, None), train_and_test(args.dataset, args.run_folder, output=args.output)]
    if dist.get_rank() == 0:
        print("AUC {:.3f} without the tower, {:.3f} with it".format(*aucs))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
