"""Processor time of a language model's step by kind of operator, and the FLOPs of its matrix products."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FROZEN, LORA, LOSS = "products of frozen layers", "products of LoRA", "products of head and loss"
ATTENTION, COPIES, OTHER = "products of attention", "copies and casts", "elementwise and other operators"
OUTSIDE = "outside of operators"
KINDS = (FROZEN, LORA, LOSS, ATTENTION, COPIES, OTHER, OUTSIDE)

# The first factor of each product among its arguments.
_PRODUCTS = {"mm": 0, "addmm": 1, "addmm_": 1, "bmm": 0, "baddbmm": 1, "baddbmm_": 1, "_linear_pointwise": 0}
_BATCHED = ("bmm", "baddbmm", "baddbmm_")
_COPIES = ("copy_", "clone", "_to_copy", "cat", "index_select", "repeat", "gather", "fill_", "zero_", "constant_pad_nd")


@dataclass
class KindCost:
    """Cost of the operators of a kind.

    Args:
        seconds: Processor time.
        flops: Of matrix products; 0 for others.
    """

    seconds: float = 0.0
    flops: float = 0.0

    @property
    def gflops(self) -> float:
        """Billions of FLOPs a second."""
        return self.flops / self.seconds / 1e9 if self.seconds else 0.0


class OperatorCosts(TorchDispatchMode):
    """Counts the processor time of each operator within it, by kind and by name.

    The profiler of torch counts elapsed time, in which other processes may have had the core.

    Args:
        max_rank: Largest inner size of a product of LoRA.
        num_items: Items of the catalog, a size of the products of the loss, which may be rounded up.
    """

    def __init__(self, max_rank: int, num_items: int) -> None:
        super().__init__()
        self.by_kind: dict[str, KindCost] = {kind: KindCost() for kind in KINDS}
        self.by_name: dict[str, float] = defaultdict(float)
        self._max_rank, self._num_items = max_rank, num_items

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        started = time.thread_time()
        result = func(*args, **(kwargs or {}))
        seconds = time.thread_time() - started
        name = func.overloadpacket.__name__
        self.by_name[name] += seconds
        cost = self.by_kind[self._kind(name, args)]
        cost.seconds += seconds
        if name in _PRODUCTS:
            cost.flops += 2.0 * prod(args[_PRODUCTS[name]].shape) * result.shape[-1]
        return result

    def _kind(self, name: str, args: Sequence[Any]) -> str:
        if name not in _PRODUCTS:
            return COPIES if name in _COPIES else OTHER
        if name in _BATCHED:
            return ATTENTION
        sizes = {size for arg in args if isinstance(arg, Tensor) for size in arg.shape}
        if max(sizes) >= self._num_items:
            return LOSS
        return LORA if min(sizes) <= self._max_rank else FROZEN


def operator_costs(
    work: Callable[[], object], processor_s: float, max_rank: int, num_items: int
) -> tuple[dict[str, KindCost], dict[str, float]]:
    """Costs of some work.

    Args:
        work: What is measured.
        processor_s: Its processor time where no operator is timed.
        max_rank: See `OperatorCosts`.
        num_items: See `OperatorCosts`.

    Returns:
        Costs of each of `KINDS`, and the seconds of each operator, largest first.
    """
    with OperatorCosts(max_rank, num_items) as costs:
        work()
    costs.by_kind[OUTSIDE].seconds = processor_s - sum(cost.seconds for cost in costs.by_kind.values())
    return costs.by_kind, dict(sorted(costs.by_name.items(), key=lambda item: -item[1]))
