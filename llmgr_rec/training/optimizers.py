"""Optimizers of one stage: fused ones on the tables, AdamW with clipping on the rest, one schedule over both."""

import math
from typing import Any

from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from llmgr_rec.config import Config, StageConfig
from llmgr_rec.distributed.fsdp import shard_groups
from llmgr_rec.modules.param_groups import param_group


def build_optimizer(model: nn.Module, stage: StageConfig, config: Config) -> CombinedOptimizer:
    """Optimizer over everything the stage trains.

    Args:
        model: The stage's task inside DistributedModelParallel, trainable groups already selected.
        stage: Learning rate of the dense parameters (AdamW, as in the paper).
        config: Their weight decay and clipping; learning rate of tables that no fused optimizer updates (adam on CPU).

    Returns:
        Groups named "" (fused), "dense" and "tables" (only where tables are trained by a dense Adam). Optimizer state
        exists from the start, so that a checkpoint can be loaded into it.
    """
    trained = {
        name: parameter
        for name, parameter in in_backward_optimizer_filter(model.named_parameters())
        if parameter.requires_grad
    }
    tables_by_name = {name: parameter for name, parameter in trained.items() if param_group(name) == "tables"}
    dense_by_name = {name: parameter for name, parameter in trained.items() if name not in tables_by_name}
    groups: list[tuple[str, KeyedOptimizer]] = [("", model.fused_optimizer)]
    if dense_by_name:
        adamw = KeyedOptimizerWrapper(
            dense_by_name, lambda p: optim.AdamW(_apart(p), lr=stage.lr, weight_decay=config.optimizer.weight_decay)
        )
        _init_state(adamw)
        groups.append(("dense", _clipped(adamw, config.optimizer.clip_norm)))
    if tables_by_name:
        adam = KeyedOptimizerWrapper(tables_by_name, lambda p: optim.Adam(p, lr=config.tables.lr))
        _init_state(adam)
        groups.append(("tables", adam))
    return CombinedOptimizer(groups)


def _init_state(optimizer: KeyedOptimizerWrapper) -> None:
    """Makes the state of an optimizer that has taken no step; TorchRec makes it by a step on gradients of zero."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.init_state()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        state["step"].zero_()


def _apart(parameters: list[Tensor]) -> list[dict[str, Any]]:
    """Parameters that are cut over ranks in a group of their own: one update of many tensors mixes no two kinds."""
    kinds = [[p for p in parameters if isinstance(p, DTensor) is cut] for cut in (False, True)]
    return [{"params": kind} for kind in kinds if kind]


def _clipped(optimizer: KeyedOptimizerWrapper, norm: float) -> GradientClippingOptimizer:
    """Clips the norm of the whole gradient: of what is cut over ranks, each rank's part counts once."""
    cut = shard_groups(optimizer.params.values())
    return GradientClippingOptimizer(
        optimizer, GradientClipping.NORM, norm, enable_global_grad_clip=bool(cut), param_to_pgs=cut
    )


class CosineSchedule:
    """Linear warm-up, then a cosine to zero, as a factor on every group's own peak rate.

    The rate is a function of the step alone, so a resumed run needs no schedule state.
    """

    def __init__(self, optimizer: CombinedOptimizer, total_steps: int, warmup: float) -> None:
        """Reads the peak rates from the optimizer.

        Args:
            optimizer: Its groups' present learning rates are the peaks.
            total_steps: Steps of the whole stage.
            warmup: Share of the steps in warm-up, 0 to 1.
        """
        self._groups = optimizer.param_groups
        self._peaks = [group["lr"] for group in self._groups]
        self._total = max(total_steps, 1)
        self._warmup = round(warmup * total_steps)

    def factor(self, step: int) -> float:
        """Share of the peak rate at a step (counted from 0), above 0 up to 1."""
        if step < self._warmup:
            return (step + 1) / self._warmup
        done = (step - self._warmup) / max(self._total - self._warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def apply(self, step: int) -> float:
        """Sets every group's rate for a step; fused optimizers take it up at the next zero_grad.

        Returns:
            The factor applied.
        """
        factor = self.factor(step)
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        return factor
