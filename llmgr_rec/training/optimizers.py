"""Optimizers of one stage: fused optimizers of the tables, AdamW with gradient clipping, and one schedule for both."""

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
    """Optimizer of all trainable parameters of a stage.

    Args:
        model: The stage's task in DistributedModelParallel, with `requires_grad` set by `select_trainable`.
        stage: Learning rate of the dense parameters (AdamW, as in LLMGR).
        config: Their weight decay and clipping; learning rate of tables without a fused optimizer (Adam on CPU).

    Returns:
        Optimizers named "" (fused), "dense" and "tables" (only if tables are trained by a dense Adam). Their state is
        initialized, so that a checkpoint can be loaded.
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
            dense_by_name,
            lambda p: optim.AdamW(_split_by_sharding(p), lr=stage.lr, weight_decay=config.optimizer.weight_decay),
        )
        _init_state(adamw)
        groups.append(("dense", _clipped(adamw, config.optimizer.clip_norm)))
    if tables_by_name:
        adam = KeyedOptimizerWrapper(tables_by_name, lambda p: optim.Adam(_split_by_sharding(p), lr=config.tables.lr))
        _init_state(adam)
        groups.append(("tables", adam))
    return CombinedOptimizer(groups)


def _init_state(optimizer: KeyedOptimizerWrapper) -> None:
    """Initializes the state without changing parameters: TorchRec does so by a step, here at learning rate 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.init_state()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        state["step"].zero_()


def _split_by_sharding(parameters: list[Tensor]) -> list[dict[str, Any]]:
    """A param group each for plain tensors and DTensors, which torch's foreach update cannot mix.

    On a CPU, plain tensors have torch's fused update, one pass over each parameter and its state in place of ten.
    """
    kinds = [[p for p in parameters if isinstance(p, DTensor) is sharded] for sharded in (False, True)]
    return [{"params": kind, "fused": _is_fused(kind)} for kind in kinds if kind]


def _is_fused(parameters: list[Tensor]) -> bool | None:
    """Whether torch fuses the update; None leaves the choice to torch."""
    return True if all(not isinstance(p, DTensor) and p.device.type == "cpu" for p in parameters) else None


def _clipped(optimizer: KeyedOptimizerWrapper, norm: float) -> GradientClippingOptimizer:
    """Clips the norm of the whole gradient, summed over the shards of parameters that are sharded across ranks."""
    groups = shard_groups(optimizer.params.values())
    return GradientClippingOptimizer(
        optimizer, GradientClipping.NORM, norm, enable_global_grad_clip=bool(groups), param_to_pgs=groups
    )


class LearningRates:
    """Linear warm-up, and cosine decay to zero or none, as a factor of each param group's peak learning rate.

    The learning rate depends only on the step, so the schedule has no state to save.
    """

    def __init__(self, optimizer: CombinedOptimizer, total_steps: int, warmup: float, decays: bool = True) -> None:
        """Takes the current learning rates as peaks.

        Args:
            optimizer: Optimizer whose param groups are scheduled.
            total_steps: Steps of the stage.
            warmup: Share of the steps in warm-up, 0 to 1.
            decays: Whether a decay follows the warm-up.
        """
        self._groups = optimizer.param_groups
        self._peaks = [group["lr"] for group in self._groups]
        self._total = max(total_steps, 1)
        self._warmup = round(warmup * total_steps)
        self._decays = decays

    def factor(self, step: int) -> float:
        """Learning rate at a step (from 0) as a share of the peak, 0 to 1."""
        if step < self._warmup:
            return (step + 1) / self._warmup
        if not self._decays:
            return 1.0
        done = (step - self._warmup) / max(self._total - self._warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def apply(self, step: int) -> float:
        """Sets the learning rates for a step; fused optimizers use them from the next `zero_grad` on.

        Returns:
            The factor of the peak learning rates.
        """
        factor = self.factor(step)
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        return factor
