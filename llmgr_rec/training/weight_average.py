"""Weight averaging: a mean of the weights over the last steps of a stage, with more weight on later ones.

At a learning rate that does not decay, weights move around the values that they would reach if it did. Their mean is
close to those values, and is there after fewer steps (SWA, Izmailov et al., UAI 2018). With the weights w[k] after the
counted steps k = 1, 2, ..., this is the polynomial-decay average of Shamir and Zhang (ICML 2013):

    mean[k] = mean[k - 1] + (P + 1) / (k + P) * (w[k] - mean[k - 1])

P = 0 gives the plain mean; with P, the weight of step k is about proportional to k^P.

The mean is the state of an optimizer that updates nothing, so that checkpoints store it, and shard it with its tables,
as the state of any other optimizer.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

# Number of steps whose weights are counted; more would change the mean little.
_COUNTED = 100
# Power P of the number of a step to which its weight in the mean is about proportional.
_POWER = 2
# Values of a block of a table that is averaged or exchanged at a time, which bounds the temporary memory.
_BLOCK_VALUES = 1 << 20


@dataclass(frozen=True)
class AveragedSteps:
    """The steps whose weights count: evenly spaced, the last one included.

    Args:
        total: Steps of the stage.
        share: Share of the steps, the last ones, among which they are.
    """

    total: int
    share: float

    def number(self, step: int) -> int:
        """How many of them are done after a step of the stage, from 1; 0 before the first."""
        span = round(self.share * self.total)
        every = max(span // _COUNTED, 1)
        left = -(-max(self.total - step, 0) // every)
        return max(-(-span // every) - left, 0)

    def counts(self, step: int) -> bool:
        """Whether the weights after a step of the stage are counted."""
        return self.number(step) > self.number(step - 1)


class WeightAverage(KeyedOptimizer):
    """The weighted mean of the trained weights.

    Args:
        weights: Trained weights by name, which share memory with the model.
        steps: The steps that count.
    """

    def __init__(self, weights: Mapping[str, Tensor], steps: AveragedSteps) -> None:
        state = {weight: {"mean": _zeros_like(weight)} for weight in weights.values()}
        super().__init__(weights, state, [])
        self._steps = steps
        self._pairs = [
            pair for weight, of in state.items() for pair in zip(_local(weight), _local(of["mean"]), strict=True)
        ]

    @classmethod
    def of(cls, model: nn.Module, optimizer: CombinedOptimizer, steps: AveragedSteps) -> Self:
        """The mean of all weights that an optimizer trains.

        Args:
            model: The sharded model.
            optimizer: Its optimizer.
            steps: The steps that count.
        """
        trained = {name for _, part in optimizer.optimizers for name in part.params}
        return cls({name: value for name, value in model.state_dict().items() if name in trained}, steps)

    def step(self, closure: Any = None) -> None:
        """Updates nothing."""

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Adds the weights after a step of the stage to the mean, if they count."""
        if not self._steps.counts(step):
            return
        share = (_POWER + 1) / (self._steps.number(step) + _POWER)
        for weight, mean in self._blocks():
            mean.lerp_(weight.to(mean.dtype), share)

    @contextmanager
    def in_model(self, step: int) -> Iterator[None]:
        """Gives the model the mean in place of its weights inside of the block, if there is one after a step."""
        if not self._steps.number(step):
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def keep(self, step: int) -> None:
        """As `in_model`, for good."""
        if self._steps.number(step):
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, mean in self._blocks():
            weights = weight.to(mean.dtype, copy=True)
            weight.copy_(mean)
            mean.copy_(weights)

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for weight, mean in self._pairs:
            rows = max(_BLOCK_VALUES // max(weight[:1].numel(), 1), 1) if weight.dim() else 1
            yield from zip(weight.split(rows), mean.split(rows), strict=True) if weight.dim() else [(weight, mean)]


def _local(value: Tensor) -> list[Tensor]:
    """This rank's parts of a tensor, which may be sharded."""
    return [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]


def _zeros_like(value: Tensor) -> Tensor:
    """float32 zeros of the shape and the sharding of a tensor."""
    if not isinstance(value, ShardedTensor):
        return torch.zeros_like(value, dtype=torch.float32)
    metadata = value.metadata()
    properties = replace(metadata.tensor_properties, dtype=torch.float32)
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        [Shard(torch.zeros_like(shard.tensor, dtype=torch.float32), shard.metadata) for shard in value.local_shards()],
        replace(metadata, tensor_properties=properties),
        process_group=value._process_group,
    )
