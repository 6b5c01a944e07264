"""Turns the features of a ranking model into the batch of a recommender: session graphs and bags of item features.

The module has no parameters and depends on the batch alone, so TorchRec's pipelines run it one batch ahead
(`pipeline_postproc=True`) and start the distribution of its bags early.

Shapes: B sessions, N nodes, C shown items, R rows of the output, X = N + C bags, V items of the catalog.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.collate import ITEM_ID, LastItemsText, prepend, texts_of_last_items
from llmgr_rec.data.graph import build_graphs
from llmgr_rec.data.jagged import Jagged, lengths_to_offsets
from llmgr_rec.errors import UserError

_INT32 = 1 << 31


@dataclass(frozen=True)
class BagKey:
    """A key of the bags that are looked up.

    Args:
        name: Name of the key, a feature of the embedding collection.
        feature: `item_id`, or a side feature of the catalog.
        of: The bags that are not empty: those of the nodes, of the shown items, or all.
    """

    name: str
    feature: str
    of: Literal["all", "nodes", "shown"] = "all"


@dataclass
class TowerBatch(Pipelineable):
    """Input of the recommender in a tower.

    Args:
        session: Sessions, with the shown items as candidates.
        session_of_row_R: Session of each row of the output, int64: of each shown item, or of each session if none are
            shown.
        is_known_C1: 1 for a shown item of the catalog, otherwise 0, float32.
    """

    session: SessionBatch
    session_of_row_R: Tensor
    is_known_C1: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """Copies the batch to a device."""
        return replace(self, **{name: part.to(device, non_blocking=non_blocking) for name, part in vars(self).items()})

    def pin_memory(self) -> Self:
        """Copies the batch to page-locked memory."""
        return replace(self, **{name: part.pin_memory() for name, part in vars(self).items()})

    def record_stream(self, stream: torch.Stream) -> None:
        """Marks the tensors as used by `stream`; see `torch.Tensor.record_stream`."""
        for part in vars(self).values():
            part.record_stream(stream)


class TowerFeatures(nn.Module):
    """Makes the batch of a recommender from a KeyedJaggedTensor, on its device.

    Clicks on unknown items (-1) are left out, and the rest is what `python -m llmgr_rec.score` shows of a session: the
    newest clicks, without consecutive repeats if the training data had none.

    Args:
        num_items: Size V of the catalog.
        side_features: Ids of each side feature, V rows each.
        keys: Keys of the bags.
        click_feature: Key of the clicks.
        item_feature: Key of the shown items; None if none are shown.
        max_length: Number of newest clicks of a session that are used.
        merges_repeats: Whether a click on the item of the click before it is left out.
        text: Texts that prompts show; None for none.
    """

    def __init__(
        self,
        num_items: int,
        side_features: Mapping[str, Jagged],
        keys: Sequence[BagKey],
        click_feature: str,
        item_feature: str | None,
        max_length: int,
        merges_repeats: bool,
        text: LastItemsText | None = None,
    ) -> None:
        super().__init__()
        self.num_items = num_items
        self.keys = list(keys)
        self.click_feature, self.item_feature = click_feature, item_feature
        self.max_length, self.merges_repeats = max_length, merges_repeats
        for name, rows in side_features.items():
            self._register_rows(name, _small(rows))
        self.num_text_items = text.num_items if text else 0
        self.separator_width = len(text.separator) if text else 0
        if text is not None:
            self._register_rows("text", prepend(text.tokens, text.separator))

    def _register_rows(self, name: str, rows: Jagged) -> None:
        # Not persistent: they are read from the bundle again.
        self.register_buffer(f"{name}_values", rows.values, persistent=False)
        self.register_buffer(f"{name}_offsets", rows.offsets, persistent=False)

    def forward(
        self, features: KeyedJaggedTensor, items: KeyedJaggedTensor | None = None, session_of_item: Tensor | None = None
    ) -> TowerBatch:
        """Makes the batch; the arguments are those of `SessionTower.forward`.

        Raises:
            UserError: A key is missing, a tensor is not of integers, an item index is not in the catalog, or the index
                of sessions has another length than the shown items or names a session that does not exist.
        """
        clicks = self._clicks(features)
        shown_C, session_of_row_R = self._shown(features, items, session_of_item)
        if not clicks.num_rows:
            # A language model needs a prompt. No row of the output is of this session.
            clicks = Jagged(clicks.values, clicks.offsets.new_zeros(2))
        graph = build_graphs(clicks.values, clicks.offsets, self.num_items)
        num_nodes, num_sessions = graph.node_items_N.numel(), clicks.num_rows
        is_known_C1 = (shown_C >= 0).unsqueeze(1).float()
        if not num_nodes + shown_C.numel():
            # TorchRec's unsharded collections fail without any bag. The rows of this item are left out again.
            shown_C = shown_C.new_full((1,), -1)
        none_B = torch.full((num_sessions,), -1, device=shown_C.device)
        batch = SessionBatch(
            features=self._bags(torch.cat([graph.node_items_N, shown_C]), num_nodes),
            graph=graph,
            targets_B=none_B,
            target_columns_B=none_B,
            weights_B=torch.ones(num_sessions, device=shown_C.device),
            rows_B=none_B,
            candidates_C=shown_C.clamp(min=0),
            log_q_C=torch.empty(0, device=shown_C.device),
            text_tokens=self._texts(clicks),
            text_items_B=none_B,
            global_size=num_sessions,
            step=0,
            epoch=0,
            num_items=self.num_items,
            pass_offsets_P1=torch.empty(0, dtype=torch.int64, device=shown_C.device),
        )
        return TowerBatch(batch, session_of_row_R, is_known_C1)

    def _clicks(self, features: KeyedJaggedTensor) -> Jagged:
        clicks = self._rows(features, self.click_feature)
        clicks = clicks.where(clicks.values >= 0)
        if self.merges_repeats:
            clicks = clicks.without_consecutive_repeats()
        return clicks.last(self.max_length)

    def _rows(self, features: KeyedJaggedTensor, key: str) -> Jagged:
        if key not in (known := features.keys()):
            raise UserError(f"the features have no key {key}; they have {', '.join(known)}")
        rows = features[key]
        values, lengths = _integers(rows.values(), f"feature {key}"), _integers(rows.lengths(), "lengths")
        if values.numel() and int(values.max()) >= self.num_items:
            raise UserError(
                f"feature {key} has item index {int(values.max())}, but the catalog has {self.num_items} items; map "
                "raw ids by SessionTower.index_of, which gives -1 for an unknown item"
            )
        return Jagged.from_lengths(values, lengths)

    def _shown(
        self, features: KeyedJaggedTensor, items: KeyedJaggedTensor | None, session_of_item: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Shown items, and the session of each row of the output, int64 [C] and [R]."""
        if self.item_feature is None:
            sessions_B = torch.arange(features.stride(), device=features.lengths().device)
            return sessions_B[:0], sessions_B
        shown = self._rows(features if items is None else items, self.item_feature)
        if session_of_item is None:
            if items is not None and items.stride() != features.stride():
                raise UserError(
                    f"there are {items.stride()} rows of shown items and {features.stride()} sessions; give "
                    "session_of_item, the session of each shown item"
                )
            return shown.values, shown.row_of_value
        num_sessions, session_of_item_C = features.stride(), _integers(session_of_item, "session_of_item")
        if session_of_item_C.shape != shown.values.shape:
            raise UserError(
                f"session_of_item has shape {list(session_of_item_C.shape)}, but {shown.values.numel()} items are shown"
            )
        if (
            shown.values.numel()
            and not 0 <= int(session_of_item_C.min()) <= int(session_of_item_C.max()) < num_sessions
        ):
            raise UserError(f"session_of_item must name sessions from 0 to {num_sessions - 1}, the rows of the clicks")
        return shown.values, session_of_item_C

    def _bags(self, items_X: Tensor, num_nodes: int) -> KeyedJaggedTensor:
        """A bag for each node, then for each shown item; empty for an unknown item."""
        is_known_X = items_X >= 0
        is_node_X = torch.arange(items_X.numel(), device=items_X.device) < num_nodes
        bags_of = {"all": is_known_X, "nodes": is_known_X & is_node_X, "shown": is_known_X & ~is_node_X}
        bags = {key.name: self._bags_of(key.feature, items_X, bags_of[key.of]) for key in self.keys}
        return KeyedJaggedTensor(
            keys=list(bags),
            values=torch.cat([rows.values for rows in bags.values()]),
            lengths=torch.cat([rows.lengths for rows in bags.values()]),
            stride=items_X.numel(),
        )

    def _bags_of(self, feature: str, items_X: Tensor, is_filled_X: Tensor) -> Jagged:
        if feature == ITEM_ID:
            return Jagged(items_X[is_filled_X], lengths_to_offsets(is_filled_X))
        rows, rows_X = self._registered(feature), items_X.clamp(min=0)
        starts_X = rows.offsets.index_select(0, rows_X).to(torch.int64)
        lengths_X = (rows.offsets.index_select(0, rows_X + 1).to(torch.int64) - starts_X) * is_filled_X
        gathered = rows.gather(starts_X, lengths_X)
        return Jagged(gathered.values.to(torch.int64), gathered.offsets)

    def _texts(self, clicks: Jagged) -> Jagged:
        """Token ids of the texts of the last clicks, one row per session."""
        if not self.num_text_items:
            return Jagged(clicks.values[:0], torch.zeros_like(clicks.offsets))
        return texts_of_last_items(clicks, self.num_text_items, self._registered("text"), self.separator_width)

    def _registered(self, name: str) -> Jagged:
        return Jagged(self.get_buffer(f"{name}_values"), self.get_buffer(f"{name}_offsets"))


def _integers(numbers: Tensor, name: str) -> Tensor:
    """The numbers as int64. TorchRec sends others between ranks with a wrong size, and floats round large indices."""
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise UserError(
            f"{name} is {numbers.dtype}, but must be integers; give dtype=torch.int64, as torch.tensor([]) is float"
        )
    return numbers.to(torch.int64)


def _small(rows: Jagged) -> Jagged:
    """The rows as int32, if all numbers fit: each rank holds those of the whole catalog."""
    largest = max(int(rows.values.max()) if rows.values.numel() else 0, rows.values.numel())
    dtype = torch.int32 if largest < _INT32 else torch.int64
    return Jagged(rows.values.to(dtype), rows.offsets.to(dtype))
