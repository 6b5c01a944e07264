"""The schedule of learning rates."""

import math
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchrec.optim.keyed import CombinedOptimizer

from llmgr_rec.training.optimizers import CosineSchedule


def schedule(total: int, warmup: float, *peaks: float) -> tuple[CosineSchedule, list[dict[str, float]]]:
    groups = [{"lr": peak} for peak in peaks or (1.0,)]
    return CosineSchedule(cast(CombinedOptimizer, SimpleNamespace(param_groups=groups)), total, warmup), groups


def test_warm_up_rises_evenly_to_the_peak_and_a_cosine_falls_to_zero() -> None:
    rates, _ = schedule(10, 0.2)
    expected = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert [rates.factor(step) for step in range(10)] == pytest.approx(expected)
    assert rates.factor(10) == pytest.approx(0)


def test_every_group_keeps_its_own_peak() -> None:
    rates, groups = schedule(8, 0.0, 0.1, 0.02)
    for step in (0, 4, 2):
        factor = rates.apply(step)
        assert [group["lr"] for group in groups] == pytest.approx([0.1 * factor, 0.02 * factor])
    assert rates.factor(4) == pytest.approx(0.5)


@given(total=st.integers(0, 500), warmup=st.floats(0, 1))
def test_every_step_trains(total: int, warmup: float) -> None:
    rates, _ = schedule(total, warmup)
    factors = [rates.factor(step) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    top = factors.index(max(factors)) if factors else 0
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    if total:
        assert max(factors) == pytest.approx(1)


@given(total=st.integers(1, 300), warmup=st.floats(0, 1), step=st.integers(0, 300))
def test_the_rate_is_a_function_of_the_step_alone(total: int, warmup: float, step: int) -> None:
    """So a resumed run goes on with the rates of an uninterrupted one."""
    walked, resumed = schedule(total, warmup)[0], schedule(total, warmup)[0]
    for earlier in range(step):
        walked.apply(earlier)
    assert walked.apply(step) == resumed.apply(step)
