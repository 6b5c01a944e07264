"""How much work a step and a batch of a session recommender are: counts that are the same on any machine."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from llmgr_rec.kernels.softmax_loss import softmax_loss
from llmgr_rec.kernels.topk import top_k
from llmgr_rec.modules.tasks import SbrTask
from tests.modules.small_llmgr import D1, make_batch, make_llmgr

SESSION = [1, 2, 3, 4, 5, 6, 7, 8]
WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "masked_select", "bincount"}
# Measured: 412 and 136. Another version of torch may split some of them.
MOST_OF_A_STEP, MOST_OF_A_BATCH = 500, 170
# Of width D, additions and multiplications of matrix products in D * D, copied elements in D. Measured: 59.6 and 20.9.
MOST_OF_A_CLICK = (66, 24)
COPIES = {"copy_", "clone", "_to_copy", "cat", "index_select", "index", "gather", "constant_pad_nd", "repeat"}


class Operators(TorchDispatchMode):
    """Counts operators, the elements of the largest result, and the elements that copying operators write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = self.copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
            self.copied += result.numel() if name in COPIES else 0
        return result


def operators_of(work: Callable[..., object], *arguments: Any) -> Operators:
    work(*arguments)
    with Operators() as counted:
        work(*arguments)
    return counted


def test_the_operators_of_a_step_do_not_depend_on_the_batch() -> None:
    recommender = make_llmgr().recommender.train()
    task = SbrTask(recommender.requires_grad_(True))
    batches = (make_batch([SESSION[:-1]] * count, [SESSION[-1]] * count) for count in (3, 24))
    few, many = (operators_of(lambda batch: task(batch)[0].backward(), batch) for batch in batches)
    assert sum(few.calls.values()) == sum(many.calls.values()) <= MOST_OF_A_STEP
    # One of them is the bound of the scores, which only a CPU asks for.
    assert sum(many.calls[name] for name in WAITS) <= 3


def test_the_operators_of_the_queries_of_a_batch_do_not_depend_on_it() -> None:
    recommender = make_llmgr().recommender.eval().requires_grad_(False)
    batches = (make_batch([SESSION] * count, [0] * count) for count in (3, 24))
    few, many = (operators_of(recommender.queries, batch) for batch in batches)
    assert sum(few.calls.values()) == sum(many.calls.values()) <= MOST_OF_A_BATCH


def test_products_and_copies_of_a_step_grow_with_the_clicks_alone() -> None:
    recommender = make_llmgr().recommender.train()
    task = SbrTask(recommender.requires_grad_(True))
    clicks = [count * (len(SESSION) - 1) for count in (3, 24, 45)]
    products, copied = [], []
    for count in (3, 24, 45):
        batch = make_batch([SESSION[:-1]] * count, [SESSION[-1]] * count)
        copied.append(operators_of(lambda batch: task(batch)[0].backward(), batch).copied)
        with FlopCounterMode(display=False) as counted:
            task(batch)[0].backward()
        products.append(counted.get_total_flops())
    for counts, most in ((products, MOST_OF_A_CLICK[0] * D1**2), (copied, MOST_OF_A_CLICK[1] * D1)):
        few, many, more = counts
        assert more - many == many - few <= most * (clicks[1] - clicks[0])


def test_neither_loss_nor_ranking_holds_the_scores_of_all_sessions() -> None:
    generator = torch.Generator().manual_seed(0)
    queries_BQ, items_CQ = (torch.randn(rows, 8, generator=generator) for rows in (1024, 12_000))
    targets_B, weights_B = torch.zeros(1024, dtype=torch.int64), torch.ones(1024)
    queries_BQ.requires_grad_(True)
    loss = operators_of(lambda: softmax_loss(queries_BQ, items_CQ, targets_B, weights_B).backward())
    ranking = operators_of(lambda: top_k(queries_BQ.detach(), items_CQ, 20))
    assert max(loss.largest, ranking.largest) <= 256 * 12_000
