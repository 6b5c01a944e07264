"""The session graph as an SVG picture without scripts and links, legible on light and dark pages and at 420 pixels.

Distinct items stand below each other in order of their first click. A step to the next row is a straight line, any
other step an arc on the left. The color of a node says whether its clicks raise or lower the score.
"""

from html import escape

from llmgr_rec.errors import UserError
from llmgr_rec.explanation.explanation_text import shown_name
from llmgr_rec.explanation.records import Edge, ExplainedItem, Explanation, Node

_WIDTH, _TOP, _ROW = 480, 66, 34
_NODE_X, _TITLE_X, _VALUE_X, _RADIUS = 96, 116, 468, 9
# Characters that fit between a node and its value, and in the heading.
_TITLE_LENGTH, _HEADING_LENGTH = 36, 58
# Horizontal distance of an arc from the nodes, per row that it spans, and at most.
_ARC_STEP, _ARC_MOST = 16, 100
_FAINTEST = 0.12
_STYLE = """
.session-graph { --paper: #fff; --ink: #1d2730; --soft: #5b6773; --up: #1f6fb5; --down: #b8500f; }
@media (prefers-color-scheme: dark) {
.session-graph { --paper: #14191e; --ink: #e8edf2; --soft: #a3afba; --up: #6db3f2; --down: #f29a5c; } }
.session-graph rect { fill: var(--paper); }
.session-graph text { fill: var(--ink);
font: 14px "Inter", "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
.session-graph .heading { font-weight: 600; }
.session-graph .soft { fill: var(--soft); font-size: 12px; }
.session-graph .value { text-anchor: end; font-variant-numeric: tabular-nums; }
.session-graph .value.up { fill: var(--up); } .session-graph .value.down { fill: var(--down); }
.session-graph circle { fill: var(--paper); stroke: var(--ink); stroke-width: 1.4; }
.session-graph circle.up { fill: var(--up); stroke: none; }
.session-graph circle.down { fill: var(--down); stroke: none; }
.session-graph path { fill: none; stroke: var(--soft); stroke-width: 1.4; marker-end: url(#session-graph-arrow); }
.session-graph path.back { stroke-dasharray: 4 3; }
.session-graph marker path { fill: var(--soft); stroke: none; marker-end: none; }
"""
_ARROW = (
    '<marker id="session-graph-arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto"><path d="M0 0 L8 4 L0 8 Z"/></marker>'
)


def session_graph_svg(explanation: Explanation, number: int = 0) -> str:
    """Draws the session graph.

    Args:
        explanation: The explanation.
        number: Number of the explained item, from 0, whose values color the nodes.

    Raises:
        UserError: There is no such item.
    """
    count = len(explanation.items)
    if not (isinstance(number, int) and 0 <= number < count):
        raise UserError(f"item is {number!r}; give the number of an explained item, 0 to {count - 1}, and not its id")
    item = explanation.items[number]
    values = [_node_value(node, item) for node in explanation.nodes]
    largest = max((abs(value) for value in values if value is not None), default=0.0) or 1.0
    height = _TOP + _ROW * max(len(values), 1)
    name = shown_name(item.item_id, item.title)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="session-graph" viewBox="0 0 {_WIDTH} {height}" '
        f'role="img" aria-label="Session graph: what each click means for {escape(name)}">',
        f"<style>{_STYLE}</style><defs>{_ARROW}</defs>",
        f'<rect width="{_WIDTH}" height="{height}"/>',
        f'<text class="heading" x="12" y="26">{escape(_shortened(name, _HEADING_LENGTH))}</text>',
        f'<text class="soft" x="12" y="46">{_legend(explanation)}</text>',
        *(_edge(edge) for edge in explanation.edges),
        *(_node(row, *pair, largest) for row, pair in enumerate(zip(explanation.nodes, values, strict=True))),
    ]
    if not explanation.nodes:
        lines.append(f'<text x="12" y="{_y(0) + 5}">no click on a known item</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _legend(explanation: Explanation) -> str:
    if not explanation.nodes:
        return "recommended as one of the most popular items"
    return "clicks, oldest first; numbers: how much each raises or lowers the score"


def _node_value(node: Node, item: ExplainedItem) -> float | None:
    """Sum over the clicks of a node of what leaving them out changes, or of the gradient where that is not computed."""
    clicks = [click for click in item.clicks if click.position in node.positions]
    left_out = [click.leave_one_out for click in clicks if click.leave_one_out is not None]
    if left_out:
        return sum(left_out)
    gradients = [click.gradient_x_input for click in clicks if click.gradient_x_input is not None]
    return sum(gradients) if gradients else None


def _node(row: int, node: Node, value: float | None, largest: float) -> str:
    positions, name = ", ".join(map(str, node.positions)), shown_name(node.item_id, node.title)
    places = _shortened(positions, _TITLE_LENGTH // 2)
    title = _shortened(name, _TITLE_LENGTH - len(places))
    # A value that is shown as 0 raises and lowers nothing.
    rounded = round(value or 0.0, 2)
    kind = "" if not rounded else "up" if rounded > 0 else "down"
    opacity = min(max(abs(rounded) / largest, _FAINTEST), 1)
    fill = f'<circle class="{kind}" cx="{_NODE_X}" cy="{_y(row)}" r="{_RADIUS - 1}" fill-opacity="{opacity:.2f}"/>'
    shown = "" if value is None else f"{rounded:+.2f}" if rounded else "0.00"
    return (
        f"<g><title>{positions} {escape(name)}: {shown}</title>"
        f'<circle cx="{_NODE_X}" cy="{_y(row)}" r="{_RADIUS}"/>'
        f"{fill if kind else ''}"
        f'<text x="{_TITLE_X}" y="{_y(row) + 5}"><tspan class="soft">{places}</tspan> {escape(title)}</text>'
        f'<text class="value {kind}" x="{_VALUE_X}" y="{_y(row) + 5}">{shown}</text></g>'
    )


def _edge(edge: Edge) -> str:
    """An arrow, with the number of times that the session follows it if that is more than one."""
    start, end = _y(edge.source), _y(edge.target)
    kind = ' class="back"' if edge.target <= edge.source else ""
    middle = (start + end) / 2
    if edge.target == edge.source + 1:
        path = f"M{_NODE_X} {start + _RADIUS} L{_NODE_X} {end - _RADIUS - 1}"
        count_x = _NODE_X - 6.0
    else:
        # Steps leave a node and arrive at it at different heights, so that their arcs do not meet.
        shift = 5 if edge.target > edge.source else -5
        reach = min(_ARC_STEP * max(abs(edge.target - edge.source), 2), _ARC_MOST)
        x, start, end = _NODE_X - _RADIUS + 1, start + shift, end - shift
        path = f"M{x} {start} C{x - reach} {start}, {x - reach} {end}, {x - 1} {end}"
        count_x = x - reach * 3 / 4 - 4
    count = f'<text class="soft" x="{count_x:g}" y="{middle + 4:g}" text-anchor="end">{edge.count}x</text>'
    return f'<path{kind} d="{path}"/>' + (count if edge.count > 1 else "")


def _y(row: int) -> int:
    return _TOP + _ROW * row + _ROW // 2


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
