"""A decoder cut over the ranks: what is cut, how ranks with unlike work keep together, what is clipped."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from llmgr_rec.modules.build import build_recommender
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmgr_rec.config import Config
from llmgr_rec.distributed.fsdp import decoder_parameters, fully_shard_decoders, is_sharded
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.sharding import shard
from llmgr_rec.errors import UserError
from llmgr_rec.modules import text_reader
from llmgr_rec.modules.param_groups import param_group, select_trainable
from llmgr_rec.modules.tasks import LLMTextTask
from llmgr_rec.storage.table_io import init_tables
from llmgr_rec.training.optimizers import build_optimizer
from tests.modules.small_llmgr import NUM_ITEMS, collator, make_llmgr, raw_sessions
from tests.modules.test_text_reader import COLUMNS, SESSIONS, TARGETS, batch, reader_of
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.dist


def cut_model(world: World) -> dict[str, bool]:
    """By parameter of a model, whether it is cut; the model tells its layers, or is refused."""
    untold = make_llmgr()
    untold.language_model.base._no_split_modules = None
    with pytest.raises(UserError, match=r"llm\.shard is true, but LlamaModel .*; set llm\.shard to false"):
        fully_shard_decoders(untold, world)
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


def test_the_language_model_is_cut_and_nothing_else() -> None:
    first, second = run_on_ranks(cut_model, 2)
    assert first == second
    assert {name.split(".")[0] for name, cut in first.items() if cut} == {"language_model"}
    assert not any(name.startswith("language_model") for name, cut in first.items() if not cut)


def test_alone_nothing_is_cut() -> None:
    model = make_llmgr()
    fully_shard_decoders(model, World.alone())
    assert not is_sharded(model)


def read_unlike(world: World) -> None:
    """Ranks read as many items as they please, in as many calls as these need, and train on them."""
    text_reader._TOKENS_AT_ONCE = 24
    reader = reader_of().requires_grad_(True)
    plain = deepcopy(reader)
    calls: list[int] = []
    reader.decoder.register_forward_hook(lambda *_: calls.append(1))
    fully_shard_decoders(reader, world)
    items = [torch.arange(NUM_ITEMS), torch.tensor([3]), torch.empty(0, dtype=torch.int64)][world.rank]
    factors = torch.arange(1.0, 1 + COLUMNS)
    for model in (reader, plain):
        # Twice, as sessions and candidates are read.
        (model.item_vectors(items) @ factors).sum().add((model.item_vectors(items[:1]) * factors).sum()).backward()
    for (name, cut), whole in zip(reader.decoder.named_parameters(), plain.decoder.parameters(), strict=True):
        expected = torch.zeros_like(whole) if whole.grad is None else whole.grad
        dist.all_reduce(expected)
        torch.testing.assert_close(full(cut.grad), expected / world.size, atol=1e-5, rtol=1e-4, msg=name)
    made = [0] * world.size
    dist.all_gather_object(made, len(calls))
    assert made == [made[0]] * world.size
    sessions = collator()(raw_sessions([[]], [1])) if world.rank else batch()
    with torch.no_grad():
        torch.testing.assert_close(reader.queries(sessions), plain.queries(sessions), atol=1e-5, rtol=1e-4)


def full(value: Any) -> Tensor:
    assert isinstance(value, DTensor)
    return value.full_tensor()


def test_ranks_with_unlike_work_wait_for_each_other() -> None:
    run_on_ranks(read_unlike, 3, timeout_s=60)


def read_changed(world: World) -> None:
    """Weights that are written through the state of a decoder are those that it reads with from then on."""
    reader, items = reader_of().requires_grad_(True), torch.arange(NUM_ITEMS)
    plain = deepcopy(reader)
    fully_shard_decoders(reader, world)
    with torch.no_grad():
        # Without a backward pass, the embedding and the norm stay whole after a call.
        before = reader.item_vectors(items)
        for model in (reader, plain):
            for value in model.decoder.state_dict().values():
                value.mul_(1.5)
        after = reader.item_vectors(items)
        assert not torch.allclose(before, after, atol=1e-2)
        torch.testing.assert_close(after, plain.item_vectors(items), atol=1e-5, rtol=1e-4)


def test_weights_that_are_loaded_are_read() -> None:
    run_on_ranks(read_changed, 2, timeout_s=60)


def clip(world: World) -> tuple[float, float, float]:
    """Norm of a whole gradient before and after a step, and the one that was told."""
    config = Config()
    config.tables.dim, config.optimizer.clip_norm = 16, 0.5
    recommender = build_recommender(config, NUM_ITEMS, {"category": 3}, "meta", reader_of())
    task = LLMTextTask(recommender, world.size)
    select_trainable(task, ["text_encoder"])
    model = shard(task, config.tables, world, lambda name: param_group(name) == "text_encoder", cut_decoders=True)
    init_tables(model, 0, 0.1)
    optimizer = build_optimizer(model, config.text, config.tables)
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
    for before, after, told in answers:
        assert before > 1
        assert told == pytest.approx(before, rel=1e-5)
        assert after == pytest.approx(0.5, rel=1e-4)
    assert answers[0] == pytest.approx(answers[1], rel=1e-6)
