"""Seconds of training that a side needs to rank validation sessions better than the peer ever did."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.turns_protocol import Epoch, Trainer


@dataclass(frozen=True)
class Passed:
    """When a side has passed a value of NDCG@20.

    Args:
        epoch: Number of the epoch, from 1.
        seconds: Seconds of training to its end, without validation.
        processor_seconds: Processor time of them.
        ndcg: NDCG@20 after it.
    """

    epoch: int
    seconds: float
    processor_seconds: float
    ndcg: float


def passed(epochs: Sequence[Epoch], ndcg: float) -> Passed | None:
    """The first epoch after which NDCG@20 is at least `ndcg`; None without one."""
    seconds = processor_seconds = 0.0
    for number, epoch in enumerate(epochs, start=1):
        seconds, processor_seconds = seconds + epoch.seconds, processor_seconds + epoch.processor_seconds
        if epoch.ndcg >= ndcg:
            return Passed(number, seconds, processor_seconds, epoch.ndcg)
    return None


def stopped_rising(epochs: Sequence[Epoch], patience: int) -> bool:
    """Whether NDCG@20 was highest at least `patience` epochs ago; never with a patience of 0."""
    if not patience or not epochs:
        return False
    best = max(range(len(epochs)), key=lambda number: epochs[number].ndcg)
    return len(epochs) - 1 - best >= patience


def train_to_quality(trainer: Trainer, ndcg: float, most_seconds: float) -> None:
    """Trains until NDCG@20 is at least `ndcg`, for at most `most_seconds`, or until the training has ended."""
    while passed(trainer.epochs, ndcg) is None and trainer.seconds < most_seconds and not trainer.ended:
        trainer.train()


def time_to_quality(epochs: Mapping[str, Sequence[Epoch]], peer: str) -> dict[str, Any]:
    """When each side has passed the best NDCG@20 of the peer.

    Args:
        epochs: Epochs of each side.
        peer: Name of the peer among them.
    """
    best = max(epoch.ndcg for epoch in epochs[peer])
    reached = {name: passed(of_side, best) for name, of_side in epochs.items()}
    return {"ndcg": best, "sides": {name: at and asdict(at) for name, at in reached.items()}}
