"""Sessions as they come from the reader, and the batch that the model takes.

Shapes: B sessions, P passes, L clicks, N nodes, C candidates, V items in the catalog.
"""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.data.jagged import Jagged


def _no_passes() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass
class RawSessions:
    """This rank's sessions of one global batch, before graphs are built.

    Args:
        items_L: Item index of each click, oldest first, int64.
        offsets_B1: First click of each session, int64 [B + 1].
        targets_B: Item that followed the session, int64; -1 where none is known.
        weights_B: Weight in the loss, float32; 0 marks a filler row that keeps the ranks in step.
        rows_B: Row number in the split (example number with prefix augmentation), int64; -1 for a filler row.
        global_size: Real rows of the global batch, over all ranks.
        step: Number of the global batch in its epoch.
        epoch: Number of the epoch.
        pass_offsets_P1: First session of each pass, and last their number, int64: the sessions of a pass are prefixes
            of one, each one click longer than the one before. Empty where each session is encoded separately.
        whole: All rows of the global batch, those of every rank, where the reader was asked for them; its
            sessions are not expanded to prefixes.
    """

    items_L: Tensor
    offsets_B1: Tensor
    targets_B: Tensor
    weights_B: Tensor
    rows_B: Tensor
    global_size: int
    step: int = 0
    epoch: int = 0
    pass_offsets_P1: Tensor = field(default_factory=_no_passes)
    whole: "RawSessions | None" = None


@dataclass
class SessionBatch(Pipelineable):
    """What a model's forward takes.

    Args:
        features: One bag for each of the N nodes, then one for each of the C candidates (stride N + C); keys `item_id`
            and the side features. It is the attribute that TorchRec's pipelines look up ahead.
        graph: Session graphs; its nodes are the first N bags.
        targets_B: Item to be predicted, int64; -1 where there is none.
        target_columns_B: Column of the target among the scored items, int64: its place in `candidates_C`, or the item
            index itself where the whole catalog is scored; -1 where there is no target.
        weights_B: Weight in the loss, float32; 0 marks a filler row.
        rows_B: Row number in the split, int64; -1 for a filler row.
        candidates_C: Item index of each candidate, int64; empty where item vectors are cached elsewhere.
        log_q_C: Log of the expected count of each candidate in the sample, float32, for the logQ correction; large
            enough for no softmax where an item is held out of training. Empty where there is nothing to correct.
        text_tokens: Token ids for the text place of the prompt, one row a session.
        text_items_B: Item whose text is shown, int64; -1 where none or several.
        global_size: Real rows of the global batch, over all ranks.
        step: Number of the global batch in its epoch.
        epoch: Number of the epoch.
        num_items: Size V of the catalog.
        pass_offsets_P1: First session of each pass, see `RawSessions`.
    """

    features: KeyedJaggedTensor
    graph: SessionGraph
    targets_B: Tensor
    target_columns_B: Tensor
    weights_B: Tensor
    rows_B: Tensor
    candidates_C: Tensor
    log_q_C: Tensor
    text_tokens: Jagged
    text_items_B: Tensor
    global_size: int
    step: int
    epoch: int
    num_items: int
    pass_offsets_P1: Tensor = field(default_factory=_no_passes)

    @property
    def num_sessions(self) -> int:
        """Number of sessions B on this rank, filler rows included."""
        return self.targets_B.numel()

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """The same batch on another device."""
        return replace(
            self,
            **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _DEVICE_FIELDS},
        )

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _DEVICE_FIELDS})

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory from reuse until `stream` has done its work."""
        for name in _DEVICE_FIELDS:
            getattr(self, name).record_stream(stream)


_DEVICE_FIELDS = (
    "features",
    "graph",
    "targets_B",
    "target_columns_B",
    "weights_B",
    "rows_B",
    "candidates_C",
    "log_q_C",
    "text_tokens",
    "text_items_B",
    "pass_offsets_P1",
)
