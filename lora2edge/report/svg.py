"""Small charts as inline SVG: classes for colours, so that the page's light and dark themes both apply.

Hand-made because a page must stay small, its text real text at the page's font, and its bytes the same each time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

WIDTH = 480
_MARKERS = "osdt"


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps figures to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        value = min(max(value, min(self.low, self.high)), max(self.low, self.high))
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self, most: int = 6) -> list[float]:
        """Round figures within the scale."""
        return _log_ticks(self.low, self.high, most) if self.log else _linear_ticks(self.low, self.high, most)


def linear(values: Sequence[float], start: float, stop: float, *, zero: bool = False) -> Scale:
    """A linear scale with some room around `values`, or from zero."""
    low, high = min(values), max(values)
    room = (high - low or abs(high) or 1.0) * 0.08
    return Scale(0.0 if zero else low - room, high + room, start, stop)


def logarithmic(values: Sequence[float], start: float, stop: float) -> Scale:
    """A logarithmic scale with some room around the positive ones of `values`."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    room = max((high / low) ** 0.08, 1.25)
    return Scale(low / room, high * room, start, stop, log=True)


@dataclass(slots=True)
class Canvas:
    """Collects shapes; `to_svg` gives the element."""

    height: int
    label: str
    """What the chart shows, for those who do not see it."""
    width: int = WIDTH
    _shapes: list[str] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        self._shapes.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{css}"/>')

    def rect(
        self, x: float, y: float, width: float, height: float, css: str, tip: str = "", opacity: float = 1
    ) -> None:
        fade = f' fill-opacity="{opacity:.3g}"' if opacity != 1 else ""
        self._shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{max(width, 0):g}" height="{max(height, 0):g}" class="{css}"{fade}>'
            f"{_tip(tip)}</rect>"
        )

    def path(self, points: Sequence[tuple[float, float]], css: str, tip: str = "") -> None:
        steps = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._shapes.append(f'<polyline points="{steps}" class="{css}">{_tip(tip)}</polyline>')

    def text(self, x: float, y: float, text: str, css: str = "", anchor: str = "start", turn: float = 0) -> None:
        turned = f' transform="rotate({turn:g} {x:g} {y:g})"' if turn else ""
        self._shapes.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{css}"{turned}>{escape(text)}</text>'
        )

    def marker(self, x: float, y: float, series: int, tip: str = "") -> None:
        """A dot of the series' colour and shape: told apart without colour too."""
        css, shape = f"fill s{series % 8}", _MARKERS[series % 4]
        if shape == "o":
            self._shapes.append(f'<circle cx="{x:g}" cy="{y:g}" r="5" class="{css}">{_tip(tip)}</circle>')
            return
        reaches: dict[str, list[tuple[float, float]]] = {
            "s": [(-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)],
            "d": [(0, -6.5), (6.5, 0), (0, 6.5), (-6.5, 0)],
            "t": [(0, -6), (6, 5), (-6, 5)],
        }
        corners = " ".join(f"{x + dx:g},{y + dy:g}" for dx, dy in reaches[shape])
        self._shapes.append(f'<polygon points="{corners}" class="{css}">{_tip(tip)}</polygon>')

    def axis_x(
        self, scale: Scale, top: float, bottom: float, name: str, labels: Sequence[str], right: float | None = None
    ) -> None:
        """Grid lines at the scale's ticks, their labels below, the axis's name under them; the line ends at `right`."""
        for tick, label in zip(scale.ticks(), labels, strict=True):
            self.line(scale(tick), top, scale(tick), bottom, "grid")
            self.text(scale(tick), bottom + 16, label, "tick", "middle")
        self.line(scale.start, bottom, right or scale.stop, bottom, "axis")
        self.text((scale.start + scale.stop) / 2, bottom + 34, name, "name", "middle")

    def axis_y(self, scale: Scale, left: float, right: float, labels: Sequence[str]) -> None:
        """Grid lines at the scale's ticks, their labels left."""
        for tick, label in zip(scale.ticks(), labels, strict=True):
            self.line(left, scale(tick), right, scale(tick), "grid")
            self.text(left - 6, scale(tick) + 4, label, "tick", "end")

    def to_svg(self) -> str:
        shapes = "".join(self._shapes)
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.label)}" '
            f'xmlns="http://www.w3.org/2000/svg">{shapes}</svg>'
        )


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions close to `wanted`, at least `gap` apart and between `low` and `high` as far as that is possible."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = [min(max(wanted[index], low), high) for index in order]
    for here in range(1, len(placed)):
        placed[here] = max(placed[here], placed[here - 1] + gap)
    if placed and placed[-1] > high:
        placed[-1] = high
        for here in range(len(placed) - 2, -1, -1):
            placed[here] = min(placed[here], placed[here + 1] - gap)
    result = [0.0] * len(wanted)
    for place, index in zip(placed, order, strict=True):
        result[index] = place
    return result


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [round(number * step, 12) for number in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            break
    else:
        ticks = ticks[:: math.ceil(len(ticks) / most)]
    if len(ticks) < 3:  # about a decade: round figures between the ends
        ticks = [tick for tick in _linear_ticks(low, high, most) if tick > 0]
    return ticks


def steps(values: Sequence[float]) -> list[tuple[float, float]]:
    """The corners of the empirical distribution of sorted `values`: (value, share of values up to it)."""
    count = len(values)
    corners = [(values[0], 0.0)]
    for index, (here, after) in enumerate(pairwise([*values, values[-1]]), start=1):
        corners += [(here, index / count), (after, index / count)]
    return corners
