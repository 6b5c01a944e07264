"""Explanations as sentences that need no knowledge of the model."""

from typing import Any

from llmgr_rec.explanation.records import ClickPart, ExplainedItem, Explanation, Part

# Parts with a smaller share are not named.
_SMALLEST_SHARE = 0.005
_NAMED_ITEMS, _NAMED_WORDS = 2, 4
PART_LABELS = {
    "encoder": "the session as a whole (session encoder)",
    "text_encoder": "the session as text (text sequence encoder)",
    "llm": "the language model",
    "item_knn": "item neighbors",
    "text_knn": "similar words",
    "embedding_knn": "similar texts",
    "reranker": "the re-ranking of the best items",
    "popularity": "popularity",
}
_STATES = {"unknown": "unknown item", "merged": "same item as the click before", "too_old": "older than the model sees"}


def shown_name(item_id: Any, title: str | None) -> str:
    """The title of an item or, without one, its id; on one line, and of characters that terminals and XML take."""
    return "".join(one if one.isprintable() else " " for one in title or f"item {item_id}")


def percent(share: float, digits: int = 0) -> str:
    """A share as a percentage."""
    return f"{100 * share:.{digits}f} %"


def item_sentence(item: ExplainedItem) -> str:
    """Why an item has its score, in one or a few sentences."""
    if item.parts[0].name == "popularity":
        share = percent(item.score, 1)
        return f"The session has no known item; this is one of the most popular items ({share} of the training clicks)."
    newest = max((click.position for click in item.clicks), default=0)
    raising = [part for part in item.parts if part.value > 0 and part.share >= _SMALLEST_SHARE]
    lowering = [part for part in item.parts if part.value < 0 and part.share >= _SMALLEST_SHARE]
    said = []
    if item.excluded:
        said.append("Not recommended, because the session has clicked it before.")
    if raising:
        opening = "Its score rests on" if item.excluded else "Recommended because of"
        said.append(f"{opening}: {'; '.join(_part_words(part, newest) for part in raising)}.")
    if lowering:
        said.append(f"Lowered by: {'; '.join(_part_words(part, newest) for part in lowering)}.")
    if strongest := _strongest_click(item):
        said.append(strongest)
    if item.clicked_before and not item.excluded:
        said.append("The session has clicked it before.")
    if item.smoothing and item.smoothing.share >= 0.5:
        said.append(
            f"It has {item.training_clicks:,} training clicks; items with similar words make up "
            f"{percent(item.smoothing.share)} of its id vector."
        )
    return " ".join(said)


def explanation_text(explanation: Explanation) -> str:
    """The explanation of a session, one paragraph for each item."""
    lines = ["Session:"]
    for click in explanation.clicks:
        why = f" (not used: {_STATES[click.state]})" if click.state in _STATES else ""
        lines.append(f"  {click.position}. {shown_name(click.item_id, click.title)}{why}")
    lines += [explanation.note] if explanation.note else []
    for item in explanation.items:
        rank = f"{item.rank}." if item.rank else "-"
        lines += ["", f"{rank} {shown_name(item.item_id, item.title)}  (score {item.score:.4f})", f"   {item.text}"]
        lines += [f"   {_click_line(item, number)}" for number in range(len(item.clicks))]
        if item.nearest:
            near = ", ".join(
                f"{shown_name(other.item_id, other.title)} {other.similarity:.2f}" for other in item.nearest
            )
            lines.append(f"   nearest items: {near}")
    return "\n".join(lines) + "\n"


def _click_line(item: ExplainedItem, number: int) -> str:
    click = item.clicks[number]
    without = "not computed" if click.leave_one_out is None else f"{click.leave_one_out:+.4f}"
    gradient = "" if click.gradient_x_input is None else f", gradient x input {click.gradient_x_input:+.4f}"
    return f"click {click.position} {shown_name(click.item_id, click.title)}: leave one out {without}{gradient}"


def _part_words(part: Part, newest: int) -> str:
    """A part with its share, and the clicks that it rests on."""
    label = PART_LABELS.get(part.name, f"neighbors by {part.name}")
    text = f"{percent(part.share)} {label}"
    by_item: dict[Any, list[ClickPart]] = {}
    for click in part.clicks:
        by_item.setdefault(click.item_id, []).append(click)
    largest = sorted(by_item.values(), key=lambda clicks: -abs(sum(click.value for click in clicks)))
    named = " and ".join(_item_words(clicks, newest) for clicks in largest[:_NAMED_ITEMS])
    return f"{text} of {named}" if named else text


def _item_words(clicks: list[ClickPart], newest: int) -> str:
    """A clicked item, with its clicks and the words that it shares."""
    positions = sorted(click.position for click in clicks)
    places = f"clicks {', '.join(map(str, positions))}" if len(positions) > 1 else f"click {positions[0]}"
    if positions == [newest]:
        places = "last click"
    words = ", ".join(word.word for word in clicks[0].words[:_NAMED_WORDS])
    return f'"{shown_name(clicks[0].item_id, clicks[0].title)}" ({places}{f"; words: {words}" if words else ""})'


def _strongest_click(item: ExplainedItem) -> str:
    """The click without which the score would be the lowest."""
    known = [(click.leave_one_out, click) for click in item.clicks if click.leave_one_out is not None]
    if len(known) < 2:
        return ""
    value, click = max(known, key=lambda pair: pair[0])
    if value <= 0:
        return ""
    name = shown_name(click.item_id, click.title)
    return f'The most important click is "{name}": without it, the score falls by {value:.2f}.'
