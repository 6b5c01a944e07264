from collections import Counter

import pytest
import torch
from torch.nn import functional

from llmgr_rec.config import TablesConfig
from llmgr_rec.modules.param_groups import param_group, select_trainable
from llmgr_rec.modules.tasks import AlignTask, BehaveTask, SbrTask
from tests.modules.small_llmgr import NUM_ITEMS, collator, make_batch, make_llmgr, score
from tests.ranks import run_on_ranks

ALIGN = {"contrastive_weight": 0.5}
SESSIONS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [2, 2], [0, 11]]
TARGETS = [4, 0, 1, 11, 3, 5]


def align_batch(sessions=SESSIONS, **settings):
    return make_batch(sessions, [0] * len(sessions), text="random_node", **settings)


def test_behave_loss_is_cross_entropy_over_the_catalog():
    model = make_llmgr().eval()
    batch = make_batch()
    loss, parts = BehaveTask(model)(batch)
    scores = model(batch) @ score(model, batch).items_CQ.T
    torch.testing.assert_close(loss, functional.cross_entropy(scores, batch.targets_B))
    assert not parts["loss"].requires_grad


@pytest.mark.parametrize("head", ["tied", "linear"])
def test_separate_loss_trains_the_heads_own_score_and_ranks_by_the_sum(head):
    model = make_llmgr(head, separate_loss=True).eval()
    batch = make_batch(SESSIONS, TARGETS)
    output = model.look_up(batch)
    both = score(model, batch)
    recommender_BC = output.queries_BQ @ output.candidates_CQ.T
    own_BC = both.queries_BQ @ both.items_CQ.T - recommender_BC
    assert own_BC.abs().max() > 1e-2
    loss, _ = BehaveTask(model)(batch)
    torch.testing.assert_close(loss, functional.cross_entropy(own_BC, batch.targets_B), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(model(batch), both.queries_BQ)


def test_a_loss_in_bfloat16_stays_close_to_the_one_in_float32():
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make_llmgr(separate_loss=True).eval()
        model.cache_catalog(model.rows(collator().item_features(torch.arange(NUM_ITEMS))), dtype)
        assert model.text_VH.dtype == dtype
        loss, _ = BehaveTask(model, loss_dtype=dtype)(make_batch(SESSIONS, TARGETS))
        loss.backward()
        gradients[dtype] = [loss.detach(), model.head.text.weight.grad, model.head.query.weight.grad]
    for low, exact in zip(gradients[torch.bfloat16], gradients[torch.float32], strict=True):
        assert low.dtype == torch.float32
        assert 0 < float((low - exact).norm() / exact.norm()) < 0.02


def test_sbr_loss_is_cross_entropy_over_the_catalog():
    recommender = make_llmgr().recommender.eval()
    batch = make_batch()
    output = recommender(batch)
    loss, _ = SbrTask(recommender)(batch)
    expected = functional.cross_entropy(output.queries_BQ @ output.candidates_CQ.T, batch.targets_B)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kind", ["sbr", "align", "behave"])
def test_filler_rows_do_not_count(kind):
    model = make_llmgr().eval()
    task = {
        "sbr": SbrTask(model.recommender),
        "align": AlignTask(model, **ALIGN),
        "behave": BehaveTask(model),
    }[kind]
    make = align_batch if kind == "align" else lambda sessions, **s: make_batch(sessions, TARGETS[: len(sessions)], **s)
    loss, _ = task(make(SESSIONS[:3]))
    with_filler, _ = task(make(SESSIONS[:4], weights=[1, 1, 1, 0]))
    torch.testing.assert_close(with_filler, loss)


def test_two_ranks_average_to_one():
    """Losses of two parts, each scaled for two ranks, average to the loss of the whole batch."""
    model = make_llmgr().eval()

    def halves(task_class, make, **settings):
        whole, _ = task_class(model, **settings)(make(SESSIONS))
        task = task_class(model, world_size=2, **settings)
        parts = []
        for rows in (slice(0, 4), slice(4, 6)):
            batch = make(SESSIONS[rows])
            batch.global_size = len(SESSIONS)
            batch.rows_B = torch.arange(len(SESSIONS))[rows]
            parts.append(task(batch)[0])
        return whole, sum(parts) / 2

    targets = dict(zip(map(tuple, SESSIONS), TARGETS, strict=True))
    whole, mean = halves(BehaveTask, lambda rows: make_batch(rows, [targets[tuple(row)] for row in rows]))
    torch.testing.assert_close(mean, whole)
    settings = {**ALIGN, "contrastive_group": 2}
    whole, mean = halves(_StructureOnly, lambda rows: make_batch(rows, [0] * len(rows)), **settings)
    torch.testing.assert_close(mean, whole)


class _StructureOnly(AlignTask):
    def forward(self, batch):
        return self._structure(self.llmgr.look_up(batch), batch), {}


def test_align_predicts_the_item_whose_text_is_shown():
    batch = align_batch()
    assert torch.equal(batch.target_columns_B, batch.text_items_B)
    assert all(int(item) in session for item, session in zip(batch.targets_B, SESSIONS, strict=True))
    _, parts = AlignTask(make_llmgr().eval(), **ALIGN)(batch)
    assert set(parts) == {"loss", "context", "structure"}
    torch.testing.assert_close(parts["loss"], parts["context"] + 0.5 * parts["structure"])


def test_align_without_contrast_encodes_one_prompt():
    model = make_llmgr().eval()
    reads = []
    model.language_model.register_forward_hook(lambda *_: reads.append(1))
    AlignTask(model, **ALIGN)(align_batch())
    assert len(reads) == 3
    reads.clear()
    _, parts = AlignTask(model, **{**ALIGN, "contrastive_weight": 0.0})(align_batch())
    assert len(reads) == 1
    assert set(parts) == {"loss"}


def test_contrastive_loss_falls_when_lists_belong_to_their_graphs():
    """It is a loss about structure: training on it separates own node lists from others'."""
    torch.manual_seed(0)
    model = make_llmgr()
    select_trainable(model, ["adapter", "lora"])
    task = AlignTask(model, **{**ALIGN, "contrastive_weight": 1.0})
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(task._structure(model.look_up(align_batch()), align_batch()))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_targets_do_not_reach_the_prompt():
    """Another target changes the loss, but none of what the language model is given."""
    model = make_llmgr(with_text=True).eval()
    given = []
    model.language_model.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    first, second = (
        BehaveTask(model)(make_batch(targets=targets, text="last_items", text_items=3))[0]
        for targets in ([0, 3, 11], [9, 8, 10])
    )
    assert first != second
    (one, one_packed), (other, other_packed) = given
    assert torch.equal(one, other)
    for name, value in vars(one_packed).items():
        same = vars(other_packed)[name]
        assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same


def _train_sharded(world, kind):
    """Some pipelined steps of a sharded model; returns what moved and what was pipelined."""
    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

    from llmgr_rec.distributed.sharding import shard

    model = make_llmgr()
    select_trainable(model, ["adapter", "lora", "head"])
    task = AlignTask(model, **ALIGN) if kind == "align" else BehaveTask(model)
    make = align_batch if kind == "align" else lambda: make_batch(SESSIONS, TARGETS)
    sharded = shard(task, TablesConfig(), world, trained=lambda name: False)
    before = _values(sharded)
    dense = [p for name, p in sharded.named_parameters() if param_group(name) in ("adapter", "lora", "head")]
    optimizer = torch.optim.AdamW(dense, lr=1e-2)
    pipeline = TrainPipelineSparseDist(sharded, optimizer, world.device)
    batches = iter([make() for _ in range(4)])
    losses = [float(pipeline.progress(batches)["loss"]) for _ in range(4)]
    after = _values(sharded)
    moved = Counter((param_group(name), not torch.equal(before[name], after[name])) for name in before)
    return losses, dict(moved), len(pipeline._pipelined_modules)


def _values(module):
    state = {}
    for name, value in module.state_dict().items():
        locals_ = [shard.tensor for shard in value.local_shards()] if hasattr(value, "local_shards") else [value]
        state.update({f"{name}.{number}": local.detach().clone() for number, local in enumerate(locals_)})
    return state


@pytest.mark.dist
@pytest.mark.parametrize(("kind", "ranks"), [("align", 1), ("behave", 2)])
def test_pipelined_sharded_steps_move_what_trains_and_nothing_else(kind, ranks):
    for losses, moved, pipelined in run_on_ranks(_train_sharded, ranks, kind):
        assert losses[-1] < losses[0]
        assert pipelined == 2  # item tables and text tables
        assert {group for group, changed in moved if changed} == {"adapter", "lora", "head"}
        assert {group for group, changed in moved if not changed} >= {"encoder", None}
        assert ("lora", False) not in moved
        assert ("tables", True) not in moved
