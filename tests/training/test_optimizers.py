"""Optimizers of a stage, and the schedule of their rates."""

import math
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torchrec.distributed.composable.table_batched_embedding_slice import TableBatchedEmbeddingSlice
from torchrec.optim.keyed import CombinedOptimizer

from llmgr_rec.config import Config, OptimizerConfig, StageConfig, TablesConfig
from llmgr_rec.training.optimizers import LearningRates, _is_fused, build_optimizer


class SmallTask(nn.Module):
    """Dense weights and, as on a CPU with Adam, a table that no fused optimizer updates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(3, 2)
        self.item_tables = nn.Linear(3, 2, bias=False)
        self.fused_optimizer = CombinedOptimizer([])

    def loss(self, step: int) -> Tensor:
        rows = torch.arange(12.0).view(4, 3) + step
        return (self.encoder(rows) + self.item_tables(rows)).square().mean()


def test_steps_are_those_of_adamw_and_adam_from_the_first_on() -> None:
    ours, plain = SmallTask(), SmallTask()
    stage = StageConfig(lr=0.1)
    config = Config(
        tables=TablesConfig(optimizer="adam", lr=0.2), optimizer=OptimizerConfig(weight_decay=0.5, clip_norm=1e9)
    )
    built = build_optimizer(ours, stage, config)
    torch.testing.assert_close(dict(ours.named_parameters()), dict(plain.named_parameters()), atol=0, rtol=0)
    references = [
        optim.AdamW(plain.encoder.parameters(), lr=stage.lr, weight_decay=config.optimizer.weight_decay),
        optim.Adam(plain.item_tables.parameters(), lr=config.tables.lr),
    ]
    for step in range(3):
        built.zero_grad()
        ours.loss(step).backward()
        built.step()
        plain.zero_grad()
        plain.loss(step).backward()
        for reference in references:
            reference.step()
        torch.testing.assert_close(dict(ours.named_parameters()), dict(plain.named_parameters()), atol=1e-6, rtol=0)


def test_a_table_of_torchrec_has_the_fused_update() -> None:
    weights = torch.zeros(6, requires_grad=True)
    assert _is_fused([TableBatchedEmbeddingSlice(weights, 0, 6, 3, 2)])


def schedule(total: int, warmup: float, *peaks: float) -> tuple[LearningRates, list[dict[str, float]]]:
    groups = [{"lr": peak} for peak in peaks or (1.0,)]
    return LearningRates(cast(CombinedOptimizer, SimpleNamespace(param_groups=groups)), total, warmup), groups


def test_warm_up_rises_evenly_to_the_peak_and_a_cosine_falls_to_zero() -> None:
    rates, _ = schedule(10, 0.2)
    expected = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert [rates.factor(step) for step in range(10)] == pytest.approx(expected)
    assert rates.factor(10) == pytest.approx(0)


def test_without_a_decay_the_rate_stays_at_its_peak() -> None:
    groups = [{"lr": 1.0}]
    rates = LearningRates(cast(CombinedOptimizer, SimpleNamespace(param_groups=groups)), 10, 0.2, decays=False)
    assert [rates.factor(step) for step in range(10)] == [0.5] + 9 * [1.0]


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
