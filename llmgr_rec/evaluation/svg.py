"""Small charts as SVG text: axes, lines, and points with intervals.

Text stays text, and colors are CSS custom properties, so that a chart takes the font and the light or dark scheme of
the page that it stands in. Coordinates are pixels of a chart of `WIDTH`, at which labels have 12 pixels; a phone shows
it at nearly this size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH = 420
_TOP, _RIGHT, _LEFT = 14, 14, 52
_LINE_HEIGHT = 15


@dataclass(frozen=True)
class Axis:
    """A linear axis.

    Args:
        low: Value at its start.
        high: Value at its end.
        ticks: Values with a label.
        labels: Their labels.
    """

    low: float
    high: float
    ticks: Sequence[float]
    labels: Sequence[str]

    @classmethod
    def around(cls, values: Sequence[float], percent: bool = False, count: int = 5) -> "Axis":
        """An axis of round numbers around values.

        Args:
            values: At least one value.
            percent: Whether labels are percentages of 1.
            count: About how many ticks there are.
        """
        low, high = min(values), max(values)
        if high - low < 1e-9 * max(abs(high), 1e-9):
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        step = _round_step((high - low) / count)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = [number * step for number in range(first, last + 1)]
        unit = step * (100 if percent else 1)
        decimals = max(0, -math.floor(math.log10(unit) + 1e-9))
        labels = [f"{tick * (100 if percent else 1):.{decimals}f}{' %' if percent else ''}" for tick in ticks]
        return cls(ticks[0], ticks[-1], ticks, labels)

    @classmethod
    def of_names(cls, names: Sequence[str]) -> "Axis":
        """An axis with one place for each name, at 0, 1 and so on.

        Args:
            names: The names; a line break begins a second line of the label.
        """
        return cls(-0.5, len(names) - 0.5, range(len(names)), names)

    def place(self, value: float) -> float:
        """Where a value is on the axis, 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def text_width(text: str) -> float:
    """About the width of a text in pixels; fonts differ, so this is that of a wide one."""
    return sum(6.9 if letter.islower() or letter in " .,:-" else 8.4 for letter in text)


def _round_step(step: float) -> float:
    """The next of 1, 2, 5, 10 and so on, times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


@dataclass
class Chart:
    """A chart with an axis at the bottom and one on the left.

    Args:
        title: Name of the chart for screen readers.
        description: What it shows, for screen readers.
        x: Axis at the bottom.
        y: Axis on the left.
        x_title: Title of the axis at the bottom.
        y_title: Title of the axis on the left, above it.
        series: Name and color class of each series, for the legend; none without a legend.
        height: Height of the plot area.
        left: Space for the labels of the left axis.
        upright: Whether the grid lines are upright, for values on the axis at the bottom.
    """

    title: str
    description: str
    x: Axis
    y: Axis
    x_title: str
    y_title: str
    series: Sequence[tuple[str, str]] = ()
    height: int = 190
    left: int = _LEFT
    upright: bool = False
    _marks: list[str] = field(default_factory=list)

    def line(self, points: Sequence[tuple[float, float]], color: str, kind: str = "line") -> None:
        """Adds a line.

        Args:
            points: x and y of each point.
            color: Color class.
            kind: `line`, or `faint` for a background line.
        """
        path = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)
        self._marks.append(f'<polyline class="{kind} {color}" points="{path}"/>')

    def point(self, x: float, y: float, color: str, tip: str, size: float = 3.5, kind: str = "dot") -> None:
        """Adds a point.

        Args:
            x: Value on the axis at the bottom.
            y: Value on the left axis.
            color: Color class.
            tip: Text of its tooltip.
            size: Radius.
            kind: `dot`, or `ring` for a marked point.
        """
        self._marks.append(
            f'<circle class="{kind} {color}" cx="{self._x(x):.1f}" cy="{self._y(y):.1f}" r="{size}">'
            f"<title>{escape(tip)}</title></circle>"
        )

    def interval(self, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
        """Adds an interval, parallel to an axis.

        Args:
            start: x and y of one end.
            end: x and y of the other end.
            color: Color class.
        """
        ends = [coordinate for x, y in (start, end) for coordinate in (self._x(x), self._y(y))]
        x1, y1, x2, y2 = (f"{coordinate:.1f}" for coordinate in ends)
        self._marks.append(f'<line class="interval {color}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')

    def label(self, x: float, y: float, text: str, above: bool = True) -> None:
        """Adds a text at a point, which grows towards the middle of the chart.

        Args:
            x: Value on the axis at the bottom.
            y: Value on the left axis.
            text: The text.
            above: Whether it is above the point.
        """
        anchor = "end" if self.x.place(x) > 0.5 else "start"
        shift = 5 if anchor == "start" else -5
        self._marks.append(
            f'<text class="note" x="{self._x(x) + shift:.1f}" y="{self._y(y) + (-9 if above else 19):.1f}" '
            f'text-anchor="{anchor}">{escape(text)}</text>'
        )

    def render(self, style: str = "") -> str:
        """The chart as an SVG element.

        Args:
            style: CSS for a file of its own; a page has it already.
        """
        legend, rows = self._legend()
        top = _TOP + _LINE_HEIGHT * rows + 22 * bool(self.y_title)
        total = top + self.height + self._below + 8
        css = f"<style>{style}</style>" if style else ""
        title = f'<text class="axis" x="0" y="{top - 13}">{escape(self.y_title)}</text>' if self.y_title else ""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {total}" role="img" '
            f'aria-label="{escape(f"{self.title}. {self.description}")}">{css}{legend}'
            f'{title}<g transform="translate(0 {top})">{self._grid()}{"".join(self._marks)}</g></svg>'
        )

    def _grid(self) -> str:
        parts = []
        for tick, text in zip(self.y.ticks, self.y.labels, strict=True):
            rows = text.split("\n")
            for number, row in enumerate(rows):
                y = self._y(tick) + 4 + 13 * (number - (len(rows) - 1) / 2)
                parts.append(f'<text x="{self.left - 7}" y="{y:.1f}" text-anchor="end">{escape(row)}</text>')
            if not self.upright:
                parts.append(self._grid_line(tick, self.left, self._y(tick), WIDTH - _RIGHT, self._y(tick)))
        for tick, text in zip(self.x.ticks, self.x.labels, strict=True):
            for number, row in enumerate(text.split("\n")):
                y = self.height + 16 + 13 * number
                parts.append(f'<text x="{self._x(tick):.1f}" y="{y}" text-anchor="middle">{escape(row)}</text>')
            if self.upright:
                parts.append(self._grid_line(tick, self._x(tick), 0, self._x(tick), self.height))
        middle = (self.left + WIDTH - _RIGHT) / 2
        y = self.height + self._below
        parts.append(f'<text class="axis" x="{middle}" y="{y}" text-anchor="middle">{escape(self.x_title)}</text>')
        return "".join(parts)

    def _grid_line(self, tick: float, x1: float, y1: float, x2: float, y2: float) -> str:
        zero = " zero" if abs(tick) < 1e-12 else ""
        return f'<line class="grid{zero}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'

    @property
    def _below(self) -> int:
        """Distance of the title of the lower axis from the plot area."""
        return 34 + 14 * any("\n" in label for label in self.x.labels)

    def _legend(self) -> tuple[str, int]:
        """The legend, and its number of lines."""
        parts, x, row = [], 0.0, 0
        for name, color in self.series:
            width = 24 + text_width(name)
            if x and x + width > WIDTH:
                x, row = 0.0, row + 1
            y = _TOP + _LINE_HEIGHT * row
            parts.append(f'<circle class="dot {color}" cx="{x + 5:.0f}" cy="{y - 4}" r="4"/>')
            parts.append(f'<text x="{x + 14:.0f}" y="{y}">{escape(name)}</text>')
            x += width
        return "".join(parts), row + 1 if self.series else 0

    def _x(self, value: float) -> float:
        return self.left + self.x.place(value) * (WIDTH - _RIGHT - self.left)

    def _y(self, value: float) -> float:
        return self.height * (1 - self.y.place(value))
