"""A decoder sharded across ranks: what is sharded, how ranks with unequal work stay in step, what is clipped."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmgr_rec.config import Config, OptimizerConfig, TablesConfig
from llmgr_rec.distributed.fsdp import decoder_parameters, fully_shard_decoders, is_sharded
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.sharding import shard
from llmgr_rec.errors import UserError
from llmgr_rec.modules import text_sequence_encoder
from llmgr_rec.modules.param_groups import param_group, select_trainable
from llmgr_rec.modules.tasks import LLMTextTask
from llmgr_rec.storage.table_io import init_tables
from llmgr_rec.training.optimizers import build_optimizer
from tests.modules.small_llmgr import NUM_ITEMS, collator, make_llmgr, raw_sessions
from tests.modules.test_text_sequence_encoder import (
    COLUMNS,
    SESSIONS,
    TARGETS,
    batch,
    recommender_with,
    text_encoder_of,
)
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.dist


def shard_model(world: World) -> dict[str, bool]:
    """By parameter of a model, whether it is sharded; a model that does not declare its layers is refused."""
    undeclared = make_llmgr()
    undeclared.language_model.base._no_split_modules = None
    with pytest.raises(UserError, match=r"llm\.fsdp is true, but LlamaModel .*; set llm\.fsdp to false"):
        fully_shard_decoders(undeclared, world)
    model = make_llmgr()
    names = [name for name, _ in model.named_parameters()]
    decoder = {id(parameter) for parameter in decoder_parameters(model)}
    expected = [id(parameter) in decoder for parameter in model.parameters()]
    fully_shard_decoders(model, world)
    assert [name for name, _ in model.named_parameters()] == names
    found = {name: isinstance(parameter, DTensor) for name, parameter in model.named_parameters()}
    assert list(found.values()) == expected
    assert is_sharded(model)
    assert not is_sharded(model.recommender)
    held = torch.tensor(sum(value.to_local().numel() for value in model.parameters() if isinstance(value, DTensor)))
    dist.all_reduce(held)
    assert int(held) == sum(value.numel() for value in decoder_parameters(model))
    return found


def test_the_language_model_is_sharded_and_nothing_else() -> None:
    first, second = run_on_ranks(shard_model, 2)
    assert first == second
    assert {name.split(".")[0] for name, sharded in first.items() if sharded} == {"language_model"}
    assert not any(name.startswith("language_model") for name, sharded in first.items() if not sharded)


def test_a_single_rank_shards_nothing() -> None:
    model = make_llmgr()
    fully_shard_decoders(model, World.alone())
    assert not is_sharded(model)


def encode_unequal(world: World) -> None:
    """Each rank encodes its own number of items, in as many calls as these need, and trains on them."""
    text_sequence_encoder._MAX_TOKENS_PER_CALL = 24
    encoder = text_encoder_of().requires_grad_(True)
    plain = deepcopy(encoder)
    calls: list[int] = []
    encoder.decoder.register_forward_hook(lambda *_: calls.append(1))
    fully_shard_decoders(encoder, world)
    items = [torch.arange(NUM_ITEMS), torch.tensor([3]), torch.empty(0, dtype=torch.int64)][world.rank]
    factors = torch.arange(1.0, 1 + COLUMNS)
    for model in (encoder, plain):
        # Twice, as sessions and candidates are encoded.
        (model.item_vectors(items) @ factors).sum().add((model.item_vectors(items[:1]) * factors).sum()).backward()
    for (name, sharded), whole in zip(encoder.decoder.named_parameters(), plain.decoder.parameters(), strict=True):
        expected = torch.zeros_like(whole) if whole.grad is None else whole.grad
        dist.all_reduce(expected)
        torch.testing.assert_close(full(sharded.grad), expected / world.size, atol=1e-5, rtol=1e-4, msg=name)
    made = [0] * world.size
    dist.all_gather_object(made, len(calls))
    assert made == [made[0]] * world.size
    sessions = collator()(raw_sessions([[]], [1])) if world.rank else batch()
    with torch.no_grad():
        torch.testing.assert_close(encoder.queries(sessions), plain.queries(sessions), atol=1e-5, rtol=1e-4)


def full(value: Any) -> Tensor:
    assert isinstance(value, DTensor)
    return value.full_tensor()


def test_ranks_with_unequal_work_wait_for_each_other() -> None:
    run_on_ranks(encode_unequal, 3, timeout_s=60)


def encode_changed(world: World) -> None:
    """A decoder encodes with weights that were written through its state dict."""
    encoder, items = text_encoder_of().requires_grad_(True), torch.arange(NUM_ITEMS)
    plain = deepcopy(encoder)
    fully_shard_decoders(encoder, world)
    with torch.no_grad():
        # Without a backward pass, the embedding and the norm stay whole after a call.
        before = encoder.item_vectors(items)
        for model in (encoder, plain):
            for value in model.decoder.state_dict().values():
                value.mul_(1.5)
        after = encoder.item_vectors(items)
        assert not torch.allclose(before, after, atol=1e-2)
        torch.testing.assert_close(after, plain.item_vectors(items), atol=1e-5, rtol=1e-4)


def test_loaded_weights_are_used() -> None:
    run_on_ranks(encode_changed, 2, timeout_s=60)


def clip(world: World) -> tuple[float, float, float]:
    """Norm of the whole gradient before and after a step, and the one that the optimizer reports."""
    config = Config(tables=TablesConfig(dim=16), optimizer=OptimizerConfig(clip_norm=0.5))
    task = LLMTextTask(recommender_with(text_encoder_of(), "meta"), world.size)
    select_trainable(task, ["text_encoder"])
    model = shard(task, config.tables, world, lambda name: param_group(name) == "text_encoder", use_fsdp=True)
    init_tables(model, 0, 0.1)
    optimizer = build_optimizer(model, config.llm_text, config)
    optimizer.zero_grad()
    half = slice(2 * world.rank, 2 * world.rank + 2)
    loss, _ = model(collator()(raw_sessions(SESSIONS[half], TARGETS[half])))
    loss.backward()
    before = norm(model)
    optimizer.step()
    dense = dict(optimizer.optimizers)["dense"]
    for name, parameter in model.named_parameters():
        if name in dense.params:
            assert isinstance(dense.state[parameter]["exp_avg"], DTensor) == isinstance(parameter, DTensor), name
    return before, norm(model), float(dense.last_total_grad_norm)


def norm(model: nn.Module) -> float:
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert {isinstance(grad, DTensor) for grad in grads} == {True, False}
    whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
    return float(torch.stack([grad.norm() for grad in whole]).norm())


def test_the_whole_gradient_is_clipped_once() -> None:
    answers = run_on_ranks(clip, 2)
    for before, after, reported in answers:
        assert before > 1
        assert reported == pytest.approx(before, rel=1e-5)
        assert after == pytest.approx(0.5, rel=1e-4)
    assert answers[0] == pytest.approx(answers[1], rel=1e-6)
