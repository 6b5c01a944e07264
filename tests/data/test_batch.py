import pickle
from dataclasses import fields
from typing import Any

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.graph import build_graphs
from llmgr_rec.data.jagged import Jagged


def make_batch() -> SessionBatch:
    return SessionBatch(
        features=KeyedJaggedTensor(keys=["item_id"], values=torch.tensor([1, 2]), lengths=torch.tensor([1, 1])),
        graph=build_graphs(torch.tensor([1, 2]), torch.tensor([0, 2]), 3),
        targets_B=torch.tensor([0]),
        target_columns_B=torch.tensor([0]),
        weights_B=torch.ones(1),
        rows_B=torch.tensor([5]),
        candidates_C=torch.empty(0, dtype=torch.int64),
        log_q_C=torch.empty(0),
        text_tokens=Jagged.empty(1),
        text_items_B=torch.tensor([-1]),
        global_size=1,
        step=2,
        epoch=3,
        num_items=3,
    )


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, KeyedJaggedTensor):
        return [value.values(), value.lengths()]
    if hasattr(value, "__dataclass_fields__"):
        return [tensor for field in fields(value) for tensor in tensors_of(getattr(value, field.name))]
    return []


def test_to_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = make_batch()

    moved = batch.to(torch.device("meta"), non_blocking=True)

    assert isinstance(moved, Pipelineable)
    assert len(tensors_of(moved)) == len(tensors_of(batch)) >= 18
    assert {tensor.device.type for tensor in tensors_of(moved)} == {"meta"}
    assert {tensor.device.type for tensor in tensors_of(batch)} == {"cpu"}
    assert (moved.global_size, moved.step, moved.epoch, moved.num_items) == (1, 2, 3, 3)


def test_survives_the_way_between_processes() -> None:
    batch = make_batch()

    copy = pickle.loads(pickle.dumps(batch))  # noqa: S301 (our own bytes)

    for before, after in zip(tensors_of(batch), tensors_of(copy), strict=True):
        assert torch.equal(before, after)
    assert copy.features.stride() == 2


def test_number_of_sessions_counts_rows() -> None:
    assert make_batch().num_sessions == 1
