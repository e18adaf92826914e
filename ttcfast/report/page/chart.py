"""Charts as inline SVG: they follow the page's colours, light or dark, stay sharp, and are read aloud by their label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .html import Markup, short, tag

WIDTH, HEIGHT = 440, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 44
Numbers = Sequence["float | None"]


@dataclass(frozen=True)
class Series:
    """A line: ``x`` and ``y`` of equal length, None where there is a gap; ``band`` are lower and upper values around it."""

    name: str
    x: Sequence[float]
    y: Numbers
    colour: str
    dashed: bool = False
    muted: bool = False
    band: tuple[Numbers, Numbers] | None = None


@dataclass(frozen=True)
class Level:
    """A horizontal line, for instance of what does not depend on x."""

    name: str
    y: float
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """0 to 1 along the axis."""
        low, high, v = (math.log(t) if self.log else t for t in (self.low, self.high, value))
        return (v - low) / (high - low)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    levels: Sequence[Level] = (),
    x_ticks: Sequence[float] | None = None,
    x_log: bool = False,
    y_scale: Literal["auto", "linear"] = "auto",
) -> Markup:
    """A figure with a caption and lines; its values stand in tooltips, its gist in its label.

    Args:
        title: the caption. series, levels: what is drawn.
        x_ticks: None picks round numbers. x_log: for branching factors.
        y_scale: ``"auto"`` is logarithmic where the positive values span more than a decade, as in the PNG figures.
    """
    xs = [v for s in series for v in s.x]
    ys = [v for s in series for line in (s.y, *(s.band or ())) for v in line if v is not None and math.isfinite(v)]
    ys += [level.y for level in levels]
    if not xs or not ys:
        return tag("figure", tag("figcaption", title), tag("p", "nothing finite to draw", class_="note"), class_="chart")
    log = y_scale == "auto" and min((v for v in ys if v > 0), default=1.0) * 10 < max(ys)
    down = _axis([v for v in ys if v > 0] if log else ys, log, None)
    across = _axis(xs, x_log, x_ticks, tight=True)
    parts = [_frame(across, down, x_label, y_label)]
    parts += [_level(level, down) for level in levels if not log or level.y > 0]
    parts += [_series(s, across, down) for s in sorted(series, key=lambda s: not s.muted)]
    return _figure(title, _label(title, x_label, y_label, series), WIDTH, HEIGHT, parts)


def histogram(title: str, values: Sequence[float], edges: Sequence[float], colour: str, *, label: str, hollow: bool = False) -> Markup:
    """A small histogram over common ``edges``, 0 marked; values below the first edge count in the first bin."""
    width, height, base = 230, 120, 96
    counts = [0] * (len(edges) - 1)
    for v in values:
        counts[max(0, min(len(counts) - 1, sum(edge <= v for edge in edges) - 1))] += 1
    top, span = max(1, *counts), edges[-1] - edges[0]

    def place(v: float) -> float:
        return 8 + (width - 16) * (v - edges[0]) / span

    bars = []
    for left, right, n in zip(edges, edges[1:], counts, strict=False):
        x, size = place(left) + 0.5, max(place(right) - place(left) - 1, 0.5)
        rise, told = 78 * n / top, tag("title", f"{left:g} to {right:g} %: {n}")
        if n:
            bars.append(tag("rect", told, x=f"{x:.1f}", y=f"{base - rise:.1f}", width=f"{size:.1f}", height=f"{rise:.1f}"))
    ends = [(edges[0], "start"), (edges[-1], "end")] + ([(0.0, "middle")] if edges[0] < -0.15 * span and edges[-1] > 0.15 * span else [])
    texts = [tag("text", _tick(v), x=f"{place(v):.1f}", y=base + 16, text_anchor=anchor) for v, anchor in ends]
    parts = [tag("g", bars, class_="bars hollow" if hollow else "bars", style=f"--c:{colour}"),
             tag("path", d=f"M8 {base}H{width - 8}", class_="axis"), tag("path", d=f"M{place(0):.1f} 10V{base}", class_="zero"),
             tag("text", str(top), x=8, y=14, class_="faint"), *texts]  # fmt: skip
    return _figure(title, label, width, height, parts, small=True)


def legend(entries: Sequence[tuple[str, str, bool]]) -> Markup:
    """Names with their colours; the third says dashed."""
    items = []
    for name, colour, dashed in dict.fromkeys(entries):
        sample = tag("svg", tag("path", d="M1 6H25", class_="dashed" if dashed else None), viewBox="0 0 26 12", aria_hidden="true")
        items.append(tag("li", tag("span", sample, class_="s", style=f"--c:{colour}"), name))
    return tag("ul", items, class_="legend")


def _figure(title: str, label: str, width: int, height: int, parts: Sequence[Any], small: bool = False) -> Markup:
    picture = tag("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=label)
    return tag("figure", tag("figcaption", title), picture, class_="chart small" if small else "chart")


def _axis(values: Sequence[float], log: bool, ticks: Sequence[float] | None, tight: bool = False) -> _Axis:
    low, high = min(values), max(values)
    if log:
        pad = (high / low) ** 0.04 if high > low else 1.5
        low, high = low / pad, high * pad
        return _Axis(low, high, True, tuple(ticks) if ticks is not None else _log_ticks(low, high))
    pad = (0.02 if tight else 0.06) * (high - low) or abs(high) * 0.1 or 1.0
    low, high = (low - pad) if low < 0 or tight or low > 2 * pad else 0.0, high + pad
    return _Axis(low, high, False, tuple(ticks) if ticks is not None else _round_ticks(low, high))


def _round_ticks(low: float, high: float, most: int = 6) -> tuple[float, ...]:
    power = 10 ** math.floor(math.log10((high - low) / most))
    step = next(power * k for k in (1, 2, 5, 10, 20) if (high - low) / (power * k) <= most)
    return tuple(k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    gap = max(1, (last - first) // 6)
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    return tuple(t for k in range(first, last + 1, gap) for f in factors if low <= (t := f * 10.0**k) <= high)


def _tick(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}".replace("-", "−")
    power = math.floor(math.log10(abs(value)) + 1e-9)
    factor = round(value / 10.0**power, 6)
    exponent = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{exponent}" if factor == 1 else f"{factor:g}·10{exponent}"


def _right(share: float) -> float:
    return _LEFT + share * (WIDTH - _LEFT - _RIGHT)


def _up(share: float) -> float:
    return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _frame(across: _Axis, down: _Axis, x_label: str, y_label: str) -> Markup:
    bottom, parts = HEIGHT - _BOTTOM, []
    for t in down.ticks:
        y = _up(down(t))
        parts += [tag("path", d=f"M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}", class_="grid")]
        parts += [tag("text", _tick(t), x=_LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end")]
    for t in across.ticks:
        x = _right(across(t))
        parts += [tag("path", d=f"M{x:.1f} {bottom}v4", class_="axis")]
        parts += [tag("text", _tick(t), x=f"{x:.1f}", y=bottom + 17, text_anchor="middle")]
    parts += [tag("path", d=f"M{_LEFT} {_TOP}V{bottom}H{WIDTH - _RIGHT}", class_="axis")]
    parts += [tag("text", x_label, x=(WIDTH + _LEFT - _RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle", class_="name")]
    middle = (_TOP + bottom) / 2
    turned = tag("text", y_label, x=12, y=middle, text_anchor="middle", class_="name", transform=f"rotate(-90 12 {middle})")
    return tag("g", *parts, turned)


def _level(level: Level, down: _Axis) -> Markup:
    line = tag("path", tag("title", f"{level.name}: {short(level.y)}"), d=f"M{_LEFT} {_up(down(level.y)):.1f}H{WIDTH - _RIGHT}",
               class_="dashed" if level.dashed else None)  # fmt: skip
    return tag("g", line, class_="s level", style=f"--c:{level.colour}")


def _series(s: Series, across: _Axis, down: _Axis) -> Markup:
    points = [(x, y) for x, y in zip(s.x, s.y, strict=True)]
    drawable = [
        None if y is None or not math.isfinite(y) or (down.log and y <= 0) else (_right(across(x)), _up(down(y))) for x, y in points
    ]
    path, pen_down = "", False
    for place in drawable:
        path += "" if place is None else f"{'L' if pen_down else 'M'}{place[0]:.1f} {place[1]:.1f}"
        pen_down = place is not None
    parts = [_band(s, across, down)] if s.band is not None else []
    parts += [tag("path", d=path, class_="dashed" if s.dashed else None)] if path else []
    gap = 1 if len(points) <= 24 else -(-len(points) // 12)
    if not s.muted:
        marked = [(place, xy) for place, xy in list(zip(drawable, points))[::gap] if place is not None]
        parts += [
            tag("circle", tag("title", f"{s.name}, {x:g}: {short(y)}"), cx=f"{place[0]:.1f}", cy=f"{place[1]:.1f}", r=2.8)
            for place, (x, y) in marked
            if y is not None
        ]
    names = ["s", *(["muted"] if s.muted else []), *(["hollow"] if s.dashed else [])]
    return tag("g", *parts, class_=" ".join(names), style=f"--c:{s.colour}")


def _band(s: Series, across: _Axis, down: _Axis) -> Markup:
    assert s.band is not None
    lower = down.low if down.log else -math.inf
    there = [(x, max(a, lower), max(b, lower)) for x, a, b in zip(s.x, *s.band) if a is not None and b is not None]
    edge = [(x, a) for x, a, _ in there] + [(x, b) for x, _, b in reversed(there)]
    return tag("polygon", points=" ".join(f"{_right(across(x)):.1f},{_up(down(y)):.1f}" for x, y in edge), class_="band")


def _label(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """What the chart says, for those who cannot see it: each line's last value."""
    ends = []
    for s in series:
        known = [(x, y) for x, y in zip(s.x, s.y) if y is not None and math.isfinite(y)]
        if known and not s.muted:
            ends.append(f"{s.name} {short(known[-1][1])} at {known[-1][0]:g}")
    return f"{title}: {y_label} against {x_label}. Last values: {'; '.join(ends)}."
