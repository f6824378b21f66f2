"""Curves as inline SVG: no script, no network, colours from the page's style."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 8.0, 24.0


@dataclass(frozen=True)
class Line:
    """One curve; `style` is its CSS class, `name` its tooltip."""

    steps: Sequence[float]
    values: Sequence[float]
    style: str
    name: str = ""


@dataclass(frozen=True)
class Area:
    """The area between `low` and `high` over `steps`: a band around a curve, or with two steps a bar."""

    steps: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    style: str
    name: str = ""


@dataclass(frozen=True)
class Frame:
    """The part of the plane that a chart shows."""

    first: float
    last: float
    low: float
    high: float


def frame(lines: Sequence[Line]) -> Frame:
    """From the first step to the last, and from 0 to the largest value."""
    steps = [s for line in lines for s in line.steps] or [1]
    values = [v for line in lines for v in line.values] or [0.0]
    return Frame(min(steps), max(max(steps), min(steps) + 1), min(0.0, *values), max(0.0, *values) or 1.0)


def chart(
    lines: Sequence[Line],
    shown: Frame,
    *,
    label: str,
    width: float = WIDTH,
    height: float = HEIGHT,
    areas: Sequence[Area] = (),
    below: Mapping[float, str] | None = None,
) -> str:
    """An <svg> of `lines` over `areas` over a grid; `label` describes it to screen readers.

    Both axes have ticks; `below` gives the lower ones, if whole numbers would not do.
    """
    x = lambda s: LEFT + (s - shown.first) / (shown.last - shown.first) * (width - LEFT - RIGHT)
    y = lambda v: height - BOTTOM - (v - shown.low) / (shown.high - shown.low) * (height - TOP - BOTTOM)
    grid = [
        f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>'
        for v in ticks(shown.low, shown.high)
    ]
    whole = {s: f"{s:g}" for s in ticks(shown.first, shown.last) if float(s).is_integer()}
    marks = [
        f'<text x="{x(s):.1f}" y="{height - 6}" text-anchor="middle">{escape(text)}</text>'
        for s, text in (whole if below is None else below).items()
    ]
    filled = [_filled(area, x, y) for area in areas]
    drawn = [
        _drawn(line, [(x(s), y(v)) for s, v in zip(line.steps, line.values, strict=True)]) for line in lines
    ]
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
    return "".join([head, *grid, *marks, *filled, *drawn, "</svg>"])


def _filled(area: Area, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    there = list(zip(area.steps, area.high, strict=True))
    back = list(zip(area.steps, area.low, strict=True))[::-1]
    points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in there + back)
    title = f"<title>{escape(area.name)}</title>" if area.name else ""
    return f'<polygon class="{area.style}" points="{points}">{title}</polygon>'


def _drawn(line: Line, points: Sequence[tuple[float, float]]) -> str:
    if not points:
        return ""
    title = f"<title>{escape(line.name)}</title>" if line.name else ""
    if len(points) == 1:
        x, y = points[0]
        return f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="2">{title}</circle>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{line.style}" points="{path}">{title}</polyline>'


def legend_entry(style: str, text: str) -> str:
    """A short line of that style and what it stands for."""
    sample = f'<svg viewBox="0 0 24 8"><line class="{style}" x1="0" x2="24" y1="4" y2="4"/></svg>'
    return f"<span>{sample}{escape(text)}</span>"


def ticks(low: float, high: float, maximum: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], at most `maximum`."""
    rough = (high - low) / maximum
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(m * power for m in (1, 2, 5, 10, 20) if (high - low) / (m * power) <= maximum)
    count = math.floor(high / apart + 1e-9) - math.ceil(low / apart - 1e-9) + 1
    return [round((math.ceil(low / apart - 1e-9) + i) * apart, 12) for i in range(count)]
