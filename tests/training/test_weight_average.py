"""The mean of the weights over the last steps of a stage. Resuming with it is in test_resume.py."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmgr_rec.training import weight_average
from llmgr_rec.training.weight_average import AveragedSteps, WeightAverage


def weights_after(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    shapes: dict[str, tuple[int, ...]] = {"table": (7, 4), "bias": (3,), "scale": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_the_model_has_the_mean_of_the_counted_steps_inside_of_the_block_only(monkeypatch) -> None:
    monkeypatch.setattr(weight_average, "_COUNTED", 3)
    monkeypatch.setattr(weight_average, "_BLOCK_VALUES", 8)
    weights = weights_after(0)
    weights["half"] = torch.zeros(2, 2, dtype=torch.float16)
    steps = AveragedSteps(total=10, share=0.6)
    average = WeightAverage(weights, steps)
    assert [step for step in range(1, 11) if steps.counts(step)] == [6, 8, 10]
    for step in range(1, 11):
        for name, value in weights_after(step).items():
            weights[name].copy_(value)
        average.add(step)
        counted = [weights_after(done) for done in (6, 8, 10) if done <= step]
        with average.in_model(step):
            for name, value in weights_after(step).items():
                mean = mean_of([each[name] for each in counted]) if counted else value
                torch.testing.assert_close(weights[name], mean)
        for name, value in weights_after(step).items():
            assert torch.equal(weights[name], value), name
    average.keep(10)
    torch.testing.assert_close(weights["bias"], mean_of([each["bias"] for each in counted]))


def mean_of(values: list[Tensor]) -> Tensor:
    """With the weights k (k + 1) of the values k = 1, 2, ..."""
    weights = [number * (number + 1) for number in range(1, len(values) + 1)]
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


@given(total=st.integers(1, 2000), share=st.floats(0, 1))
def test_counted_steps_are_evenly_spaced_and_the_last_is_one(total: int, share: float) -> None:
    steps = AveragedSteps(total, share)
    counted = [step for step in range(1, total + 1) if steps.counts(step)]
    assert [steps.number(step) for step in counted] == list(range(1, len(counted) + 1))
    span = round(share * total)
    assert bool(counted) == bool(span)
    assert len(counted) <= min(span, 200)
    if counted:
        assert counted[-1] == total
        assert counted[0] > total - span
        assert len({later - earlier for earlier, later in pairwise(counted)}) <= 1
