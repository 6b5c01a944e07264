"""Raw sessions, which the reader yields, and session batches, which the models take.

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
        targets_B: Item that followed the session, int64; -1 for no target.
        weights_B: Weight in the loss, float32; 0 for a filler row, which only lets the rank take part in collective
            operations.
        rows_B: Row number in the split (example number with prefix augmentation), int64; -1 for a filler row.
        global_size: Number of rows of the global batch over all ranks, without filler rows.
        step: Number of the global batch in its epoch.
        epoch: Number of the epoch.
        pass_offsets_P1: First session of each pass, int64 [P + 1]; the last entry is B. The sessions of a pass are
            prefixes of one session, each one click longer than the previous one. Empty if each session is encoded
            separately.
        global_batch: Examples of all ranks, None unless the reader was asked for them. Rows that are expanded to all of
            their prefixes are not expanded here.
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
    global_batch: "RawSessions | None" = None

    @classmethod
    def to_rank(cls, clicks: Jagged) -> "RawSessions":
        """Sessions to rank items for, without targets.

        Args:
            clicks: Item indices of each session, oldest first.
        """
        none_B = torch.full((clicks.num_rows,), -1)
        return cls(
            items_L=clicks.values,
            offsets_B1=clicks.offsets,
            targets_B=none_B,
            weights_B=torch.ones(clicks.num_rows),
            rows_B=none_B,
            global_size=clicks.num_rows,
        )

    def newest(self, max_length: int) -> "RawSessions":
        """The sessions with their newest clicks only, at most `max_length` of each."""
        clicks = Jagged(self.items_L, self.offsets_B1).last(max_length)
        return replace(self, items_L=clicks.values, offsets_B1=clicks.offsets)


@dataclass
class SessionBatch(Pipelineable):
    """Input of a model's forward.

    Args:
        features: One bag for each of the N nodes, then one for each of the C candidates (stride N + C); keys `item_id`
            and the side features. TorchRec's pipelines prefetch the embeddings of this attribute.
            Where stage sbr encodes all prefixes of a pass at once, the nodes are those of the longest prefixes alone.
            From `Collator.with_table_rows`, one bag for each row of the tables instead.
        graph: Session graphs; its nodes are the first N bags.
        targets_B: Item to be predicted, int64; -1 for no target.
        target_columns_B: Column of the target among the scored items, int64: its index in `candidates_C`, or the item
            index if the whole catalog is scored; -1 for no target.
        weights_B: Weight in the loss, float32; 0 for a filler row.
        rows_B: Row number in the split, int64; -1 for a filler row.
        candidates_C: Item index of each candidate, int64; empty if item vectors are cached elsewhere.
        log_q_C: Log of the expected count of each candidate in the sample, float32, which the loss subtracts from the
            scores (logQ correction). For an item without training clicks it is large enough that the softmax is 0.
            Empty if no score is corrected.
        text_tokens: Token ids for the `{text}` placeholder of the prompt, one row per session.
        text_items_B: Item whose text is shown, int64; -1 for no text or the texts of several items.
        global_size: Number of rows of the global batch over all ranks, without filler rows.
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
        """Copies the batch to a device."""
        return replace(
            self,
            **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _DEVICE_FIELDS},
        )

    def pin_memory(self) -> Self:
        """Copies the batch to page-locked memory."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _DEVICE_FIELDS})

    def record_stream(self, stream: torch.Stream) -> None:
        """Marks the tensors as used by `stream`; see `torch.Tensor.record_stream`."""
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
