"""Charts as inline SVG: coloured by CSS variables, with a title and a description for readers
who do not see them. All text is escaped by markupsafe.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 34
_names = count(1)


@dataclass(frozen=True)
class Line:
    """A line of a chart: its points (x, y) and its number, which is its colour and dash."""

    points: Sequence[tuple[float, float]]
    style: int = 1


@dataclass(frozen=True)
class Axis:
    """An axis: what it measures, from where to where, and its marks (value, text)."""

    label: str
    low: float
    high: float
    marks: Sequence[tuple[float, str]]

    def share(self, value: float) -> float:
        """Where `value` is, 0 at the low end and 1 at the high one."""
        span = self.high - self.low
        return (value - self.low) / span if span else 0.5


def reliability(bins: Sequence[Mapping[str, float | None]], ece: float) -> Markup:
    """Accuracy over confidence, the diagonal of a calibrated teacher, the rows of each bin."""
    used = [b for b in bins if b["rows"] and b["confidence"] is not None]
    total = sum(float(b["rows"] or 0) for b in used) or 1.0
    x, y = _unit("confidence (top probability)"), _unit("accuracy")
    bars = "".join(
        _rect(x, y, float(b["lower"] or 0), float(b["upper"] or 0), float(b["rows"] or 0) / total)
        for b in used
    )
    # Fewer rows than one in a thousand are mostly chance.
    points = [
        (float(b["confidence"] or 0), float(b["accuracy"] or 0))
        for b in used
        if float(b["rows"] or 0) >= total / 1000
    ]
    body = bars + _diagonal(x, y) + _line(x, y, Line(points), dots=True)
    summary = (
        f"Reliability: expected calibration error {100 * ece:.1f} per cent. Grey bars: share of "
        "rows. Dashed: calibrated."
    )
    return _chart("Calibration", summary, x, y, body)


def histogram(bars: Sequence[Mapping[str, float]], label: str, title: str, summary: str) -> Markup:
    """Bars of (lower, upper, positions) as shares."""
    total = sum(bar["positions"] for bar in bars) or 1
    most = max((bar["positions"] for bar in bars), default=1) / total
    x = _axis(label, bars[0]["lower"] if bars else 0.0, bars[-1]["upper"] if bars else 1.0)
    y = _axis("share", 0.0, most)
    body = "".join(
        _rect(x, y, bar["lower"], bar["upper"], bar["positions"] / total, "bar") for bar in bars
    )
    return _chart(title, summary, x, y, body)


def mass_by_k(rows: Sequence[Mapping[str, float]], bands: Sequence[Sequence[float]]) -> Markup:
    """Mean head mass over k (each doubling a step), and the band from 10 % to 90 % of positions."""
    marks = [(float(n), f"{row['k']:g}") for n, row in enumerate(rows)]
    x = Axis("k, ids stored a position", 0.0, max(1.0, len(rows) - 1.0), marks)
    y = _unit("mass kept")
    area = [(float(n), band[0]) for n, band in enumerate(bands)]
    area += [(float(n), band[1]) for n, band in reversed(list(enumerate(bands)))]
    points = [(float(n), row["mean"]) for n, row in enumerate(rows)]
    body = f'<polygon class="band" points="{_points(x, y, area)}"/>'
    body += _line(x, y, Line(points), dots=True)
    summary = (
        f"Mass of the stored head by k: {rows[0]['mean']:.3f} at k = 1, {rows[-1]['mean']:.3f} at "
        f"k = {rows[-1]['k']:g} on average. Band: from 10 to 90 per cent of positions."
    )
    return _chart("Mass kept by k", summary, x, y, body)


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], label: str, title: str) -> Markup:
    """A line for each name over steps; names stand below in the page's own legend."""
    every = [point for line in lines.values() for point in line]
    if not every:
        return Markup("")
    x = _axis("step", min(p[0] for p in every), max(p[0] for p in every))
    low, high = min(p[1] for p in every), max(p[1] for p in every)
    y = _axis(label, 0.0 if 0 <= low < 0.5 * high else low, high)
    body = "".join(
        _line(x, y, Line(points, number)) for number, points in enumerate(lines.values(), 1)
    )
    summary = "; ".join(
        f"{name}: from {points[0][1]:.4g} to {points[-1][1]:.4g}"
        for name, points in lines.items()
        if points
    )
    return _chart(title, summary, x, y, body)


def _chart(title: str, summary: str, x: Axis, y: Axis, body: str) -> Markup:
    name = f"chart{next(_names)}"
    ticks = "".join(
        f'<line class="rule" x1="{_x(x, v):.1f}" x2="{_x(x, v):.1f}" y1="{_TOP}" '
        f'y2="{HEIGHT - _BOTTOM}"/><text x="{_x(x, v):.1f}" y="{HEIGHT - _BOTTOM + 13}" '
        f'text-anchor="middle">{escape(text)}</text>'
        for v, text in x.marks
    )
    ticks += "".join(
        f'<line class="rule" y1="{_y(y, v):.1f}" y2="{_y(y, v):.1f}" x1="{_LEFT}" '
        f'x2="{WIDTH - _RIGHT}"/><text x="{_LEFT - 5}" y="{_y(y, v) + 3.5:.1f}" '
        f'text-anchor="end">{escape(text)}</text>'
        for v, text in y.marks
    )
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    labels = (
        f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">'
        f"{escape(x.label)}</text>"
        f'<text x="11" y="{middle}" text-anchor="middle" transform="rotate(-90 11 {middle})">'
        f"{escape(y.label)}</text>"
    )
    return Markup(
        f'<svg role="img" aria-labelledby="{name}t {name}d" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f'<title id="{name}t">{escape(title)}</title><desc id="{name}d">{escape(summary)}</desc>'
        f"{ticks}{body}{labels}</svg>"
    )


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.share(value) * (WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - axis.share(value) * (HEIGHT - _TOP - _BOTTOM)


def _rect(x: Axis, y: Axis, low: float, high: float, value: float, kind: str = "count") -> str:
    left, right, top = _x(x, low), _x(x, high), _y(y, value)
    bottom = HEIGHT - _BOTTOM
    return (
        f'<rect class="{kind}" x="{left + 0.5:.1f}" y="{top:.1f}" '
        f'width="{max(0.5, right - left - 1):.1f}" height="{max(0.0, bottom - top):.1f}"/>'
    )


def _line(x: Axis, y: Axis, line: Line, dots: bool = False) -> str:
    made = f'<polyline class="line s{line.style}" points="{_points(x, y, line.points)}"/>'
    if dots:
        made += "".join(
            f'<circle class="dot s{line.style}" cx="{_x(x, a):.1f}" cy="{_y(y, b):.1f}" r="3"/>'
            for a, b in line.points
        )
    return made


def _diagonal(x: Axis, y: Axis) -> str:
    return (
        f'<line class="ideal" x1="{_x(x, 0):.1f}" y1="{_y(y, 0):.1f}" x2="{_x(x, 1):.1f}" '
        f'y2="{_y(y, 1):.1f}"/>'
    )


def _points(x: Axis, y: Axis, points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{_x(x, a):.1f},{_y(y, b):.1f}" for a, b in points)


def _unit(label: str) -> Axis:
    return Axis(label, 0.0, 1.0, [(v / 4, f"{v / 4:g}") for v in range(5)])


def _axis(label: str, low: float, high: float) -> Axis:
    """An axis with three to seven marks at round numbers (1, 2 or 5 times a power of ten)."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 3))
    step = max(n * power for n in (1, 2, 5) if n * power <= span / 3)
    first, last = math.ceil(low / step - 1e-9), math.floor((low + span) / step + 1e-9)
    marks = [(n * step, f"{n * step:.6g}") for n in range(first, last + 1)]
    return Axis(label, low, low + span, marks)
