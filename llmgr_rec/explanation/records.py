"""What an explanation says, as plain values: `Explanation.to_dict` is the JSON format of docs/explaining.md."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FORMAT_VERSION = 1

# used: the model has seen it. unknown: not in the catalog. merged: on the item of the click before it, where the model
# was trained without such clicks. too_old: before the newest `max_length` clicks.
ClickState = Literal["used", "unknown", "merged", "too_old"]


@dataclass(frozen=True)
class Click:
    """One click of the session as it was given.

    Args:
        position: Its number in the session, from 1.
        item_id: Raw id.
        title: Title of the item; None if it has none or is unknown.
        state: Whether the model has seen it, and if not, why.
    """

    position: int
    item_id: Any
    title: str | None
    state: ClickState


@dataclass(frozen=True)
class Node:
    """A distinct item of the clicks that the model has seen.

    Args:
        item_id: Raw id.
        title: Title of the item; None if it has none.
        positions: Positions of its clicks, ascending.
    """

    item_id: Any
    title: str | None
    positions: list[int]


@dataclass(frozen=True)
class Edge:
    """A pair of consecutive clicks.

    Args:
        source: Number of the node in the list of nodes, from 0.
        target: Number of the node that was clicked next.
        count: Number of times that the session does so.
    """

    source: int
    target: int
    count: int


@dataclass(frozen=True)
class Word:
    """A word that the texts of two items share.

    Args:
        word: The word.
        share: Its share of the similarity of the two texts, 0 to 1.
    """

    word: str
    share: float


@dataclass(frozen=True)
class ClickPart:
    """What one click adds to a nearest-neighbor part of a score: weight x recency x similarity.

    Args:
        position: Position of the click.
        item_id: Raw id.
        title: Title of the item; None if it has none.
        similarity: Similarity of the clicked item and the recommended one.
        recency: Weight of the click by its recency, 1 for the newest.
        value: What it adds to the score.
        words: Words that both texts have, the heaviest first; empty unless the part compares texts.
    """

    position: int
    item_id: Any
    title: str | None
    similarity: float
    recency: float
    value: float
    words: list[Word]


@dataclass(frozen=True)
class Part:
    """One summand of a score.

    Args:
        name: encoder, text_encoder or llm, popularity, reranker, or the nearest-neighbor baseline.
        value: What it adds to the score.
        share: Its absolute value, relative to the sum of the absolute values of all parts.
        weight: Weight of the baseline in the blend; None for other parts.
        clicks: Clicks that add something to it, the largest first; empty for parts that are no sum over clicks.
    """

    name: str
    value: float
    share: float
    weight: float | None = None
    clicks: list[ClickPart] = field(default_factory=list)


@dataclass(frozen=True)
class ClickShare:
    """What a click means for the score of an item.

    Args:
        position: Position of the click.
        item_id: Raw id.
        title: Title of the item; None if it has none.
        leave_one_out: Score minus the score of the session without the click; None if it was not computed.
        gradient_x_input: Gradient of the encoder's part with respect to the vector of the clicked item, times that
            vector; equal for several clicks on one item, whose sum is that of the node. None if the encoder's score is
            no part of the score.
    """

    position: int
    item_id: Any
    title: str | None
    leave_one_out: float | None
    gradient_x_input: float | None


@dataclass(frozen=True)
class NearItem:
    """An item with a similar vector.

    Args:
        item_id: Raw id.
        title: Title; None if it has none.
        similarity: Cosine of the item vectors.
    """

    item_id: Any
    title: str | None
    similarity: float


@dataclass(frozen=True)
class Smoothing:
    """Cold-item smoothing of the vector of an item.

    Args:
        strength: Smoothing strength of the model, in clicks.
        share: Share of items with similar words in the item's own id vector, 0 to 1.
    """

    strength: float
    share: float


@dataclass(frozen=True)
class ExplainedItem:
    """Why one item has its score.

    Args:
        item_id: Raw id.
        title: Title; None if it has none.
        rank: Position in the ranking of the whole catalog, from 1; None if the item is excluded.
        score: Its score, the sum of the parts.
        clicked_before: Whether the session has clicked it.
        excluded: Whether it is left out of the ranking, because it was clicked before.
        training_clicks: Number of clicks on it in the training data.
        smoothing: Cold-item smoothing; None without one.
        parts: Parts of the score, the largest share first.
        clicks: What each click means for the score, in order of the clicks.
        nearest: Items with the most similar vectors, the nearest first.
        text: The explanation in a sentence.
    """

    item_id: Any
    title: str | None
    rank: int | None
    score: float
    clicked_before: bool
    excluded: bool
    training_clicks: int
    smoothing: Smoothing | None
    parts: list[Part]
    clicks: list[ClickShare]
    nearest: list[NearItem]
    text: str = ""


@dataclass(frozen=True)
class Explanation:
    """Why a session gets its recommendations.

    Args:
        stage: Stage that trained the model.
        fallback: Whether the list has the most popular items, because no item of the session is known.
        clicks: The clicks of the session as it was given.
        nodes: Distinct items of the clicks that the model has seen, in order of their first click: the session graph.
        edges: Its edges.
        items: The explained items, in the order of the ranking, or in the order in which they were given.
        note: What is left out of the session, and what was not computed; empty if there is nothing to say.
    """

    stage: str
    fallback: bool
    clicks: list[Click]
    nodes: list[Node]
    edges: list[Edge]
    items: list[ExplainedItem]
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        unknown = [click.item_id for click in self.clicks if click.state == "unknown"]
        return {"format_version": FORMAT_VERSION, "unknown_clicks": len(unknown), "unknown_items": unknown} | asdict(
            self
        )

    def to_json(self) -> str:
        """The explanation as JSON text."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    def to_text(self) -> str:
        """The explanation as lines that need no knowledge of the model."""
        from llmgr_rec.explanation.explanation_text import explanation_text

        return explanation_text(self)

    def to_svg(self, item: int = 0) -> str:
        """The session graph as a picture, its nodes colored by what they mean for the score of an item.

        Args:
            item: Number of the explained item, from 0.

        Raises:
            UserError: There is no such item.
        """
        from llmgr_rec.explanation.session_graph_svg import session_graph_svg

        return session_graph_svg(self, item)

    def to_html(self) -> str:
        """Text and pictures as one page without scripts and links."""
        from llmgr_rec.explanation.explanation_page import explanation_page

        return explanation_page(self)
