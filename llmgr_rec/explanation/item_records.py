"""Records of the explained items, from the numbers that explain their scores.

Shapes: L clicks that the model is shown, K items.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmgr_rec.baselines.sparse_scores import Floats, Ints
from llmgr_rec.explanation.explanation_text import item_sentence
from llmgr_rec.explanation.records import (
    ClickPart,
    ClickShare,
    ExplainedItem,
    NearItem,
    Part,
    Smoothing,
    Word,
)
from llmgr_rec.explanation.score_parts import PartValues
from llmgr_rec.explanation.session_clicks import SessionClicks

# The part that compares texts by their words.
_BY_WORDS = "text_knn"


@dataclass(frozen=True)
class ItemNumbers:
    """What the records of K items are made of.

    Args:
        items_K: Item indices.
        ranks_K: Rank of each item, from 1; 0 if it is excluded.
        parts: The parts of the scores.
        left_out_LK: Score minus the score without a click; NaN if it was not computed.
        gradient_LK: Gradient times input; None if the encoder's score is no part of the score.
        near: Item indices and cosines of the nearest items of each item.
    """

    items_K: Ints
    ranks_K: Ints
    parts: list[PartValues]
    left_out_LK: Floats
    gradient_LK: Floats | None
    near: list[list[tuple[int, float]]]


class ItemRecords:
    """Makes the records of explained items.

    Args:
        name: Raw id and title of an item index.
        training_clicks: Number of training clicks of an item index.
        smoothing: Cold-item smoothing of an item index; None without it.
        words: Words that two items share, by their item indices.
    """

    def __init__(
        self,
        name: Callable[[int], tuple[Any, str | None]],
        training_clicks: Callable[[int], int],
        smoothing: Callable[[int], Smoothing | None],
        words: Callable[[int, int], list[Word]],
    ) -> None:
        self._name, self._training_clicks = name, training_clicks
        self._smoothing, self._words = smoothing, words

    def of(self, numbers: ItemNumbers, clicks: SessionClicks) -> list[ExplainedItem]:
        """The records of all items.

        Args:
            numbers: Their numbers.
            clicks: The session.
        """
        return [self._record(place, int(item), numbers, clicks) for place, item in enumerate(numbers.items_K)]

    def _record(self, place: int, item: int, numbers: ItemNumbers, clicks: SessionClicks) -> ExplainedItem:
        values = [float(part.values_K[place]) for part in numbers.parts]
        total = sum(map(abs, values)) or 1.0
        parts = [
            Part(part.name, value, abs(value) / total, part.weight, self._click_parts(part, place, item, clicks))
            for part, value in zip(numbers.parts, values, strict=True)
        ]
        item_id, title = self._name(item)
        rank = int(numbers.ranks_K[place])
        record = ExplainedItem(
            item_id=item_id,
            title=title,
            rank=rank or None,
            score=sum(values),
            clicked_before=item in clicks.given_C,
            excluded=rank == 0,
            training_clicks=self._training_clicks(item),
            smoothing=self._smoothing(item),
            parts=sorted(parts, key=lambda part: -part.share),
            clicks=self._click_shares(clicks, numbers, place),
            nearest=[NearItem(*self._name(other), cosine) for other, cosine in numbers.near[place]],
        )
        return replace(record, text=item_sentence(record))

    def _click_parts(self, part: PartValues, place: int, item: int, clicks: SessionClicks) -> list[ClickPart]:
        """Clicks that add something to a part, the largest first."""
        if part.clicks_LK is None or part.recency_L is None:
            return []
        values_L, items_L = part.clicks_LK[:, place], clicks.items_L
        order = np.argsort(-np.abs(values_L), kind="stable")
        return [
            ClickPart(
                int(clicks.places_L[number]) + 1,
                *self._name(int(items_L[number])),
                similarity=float(values_L[number] / part.recency_L[number] / (part.weight or 1.0)),
                recency=float(part.recency_L[number]),
                value=float(values_L[number]),
                words=self._words(int(items_L[number]), item) if part.name == _BY_WORDS else [],
            )
            for number in order[: np.count_nonzero(values_L)]
        ]

    def _click_shares(self, clicks: SessionClicks, numbers: ItemNumbers, place: int) -> list[ClickShare]:
        shares = []
        for number, (given, item) in enumerate(zip(clicks.places_L, clicks.items_L, strict=True)):
            left_out = float(numbers.left_out_LK[number, place])
            shares.append(
                ClickShare(
                    int(given) + 1,
                    *self._name(int(item)),
                    leave_one_out=None if np.isnan(left_out) else left_out,
                    gradient_x_input=None if numbers.gradient_LK is None else float(numbers.gradient_LK[number, place]),
                )
            )
        return shares
