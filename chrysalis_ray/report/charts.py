"""Charts as hand-written SVG text: loss curves, stacked bars, intervals. No library, no script needed to read them.

Colours are CSS classes (``s0`` ... ``s7``, from a palette that colour-blind readers can tell apart; a dash pattern tells the
second eight from the first), so that the page's light and dark schemes both apply. Every name is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 8
_POINTS_PER_CURVE = 80


@dataclass(frozen=True)
class Curve:
    """One line of a chart. `key` is the class that a check box hides it by, `place` chooses colour and dash."""

    label: str
    key: str
    place: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval; `role` is ``chosen``, ``winner``, ``seed`` or empty."""

    label: str
    mean: float
    low: float
    high: float
    role: str = ""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) from `low` to `high`, about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def short_count(value: float) -> str:
    """1234567 -> ``1.23 M``."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def thinned(points: Sequence[tuple[float, float]], most: int = _POINTS_PER_CURVE) -> list[tuple[float, float]]:
    """At most `most` points of a curve, evenly chosen, first and last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(k * (len(points) - 1) / (most - 1))] for k in range(most)]


# loss curves --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """Where data lands in a chart: pixels from values."""

    x_high: float
    y_low: float
    y_high: float
    width: float = 520
    height: float = 310
    left: float = 46
    right: float = 122
    top: float = 12
    bottom: float = 34

    @property
    def inner_right(self) -> float:
        return self.width - self.right

    @property
    def inner_bottom(self) -> float:
        return self.height - self.bottom

    def x(self, value: float) -> float:
        return self.left + (self.inner_right - self.left) * value / self.x_high

    def y(self, value: float) -> float:
        return self.inner_bottom - (self.inner_bottom - self.top) * (value - self.y_low) / (self.y_high - self.y_low)


def loss_chart(title: str, curves: Sequence[Curve], chart_id: str) -> str:
    """Losses by tokens, each line labelled at its end. Losses far above all others are cut off, so that one diverged
    variant does not flatten the rest. An empty text where no curve has a point."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    frame = _frame(curves)
    parts = [
        f'<svg class="chart" role="img" aria-labelledby="{chart_id}-title" viewBox="0 0 {frame.width:g} {frame.height:g}" '
        f'data-x="{frame.left:g},{frame.inner_right:g},0,{frame.x_high:.10g}" '
        f'data-y="{frame.inner_bottom:g},{frame.top:g},{frame.y_low:.10g},{frame.y_high:.10g}">',
        f'<title id="{chart_id}-title">{escape(title)}</title>',
        f'<clipPath id="{chart_id}-clip"><rect x="{frame.left:g}" y="{frame.top - 4:g}" '
        f'width="{frame.inner_right - frame.left + 4:g}" height="{frame.inner_bottom - frame.top + 8:g}"/></clipPath>',
        *_axes(frame),
        f'<g clip-path="url(#{chart_id}-clip)">',
        *(_line(frame, curve) for curve in curves),
        "</g>",
        *_end_labels(frame, curves),
        '<line class="cursor" x1="0" x2="0" y1="0" y2="0"/><circle class="spot" r="4" cx="-9" cy="-9"/></svg>',
    ]
    return "".join(parts)


def _frame(curves: Sequence[Curve]) -> _Frame:
    values = sorted(value for curve in curves for _, value in curve.points)
    middle = values[len(values) // 2]
    ordinary = [value for value in values if value <= 1.6 * middle + 0.1]
    low, high = min(ordinary), max(ordinary)
    margin = 0.06 * (high - low) or 0.05
    return _Frame(x_high=max(x for curve in curves for x, _ in curve.points) or 1.0, y_low=low - margin, y_high=high + margin)


def _axes(frame: _Frame) -> list[str]:
    parts = []
    for value in ticks(frame.y_low, frame.y_high):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{frame.left:g}" x2="{frame.inner_right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{frame.left - 7:g}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(0, frame.x_high, 4):
        x = frame.x(value)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{frame.inner_bottom + 17:g}" text-anchor="middle">{short_count(value)}</text>'
        )
    middle = (frame.left + frame.inner_right) / 2
    parts.append(f'<text class="axis" x="{middle:g}" y="{frame.height - 2:g}" text-anchor="middle">tokens</text>')
    return parts


def _line(frame: _Frame, curve: Curve) -> str:
    points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in thinned(curve.points))
    last_x, last_y = curve.points[-1]
    title = f"<title>{escape(curve.label)}: {last_y:.4f} after {short_count(last_x)} tokens</title>"
    end = f'<circle cx="{frame.x(last_x):.1f}" cy="{frame.y(last_y):.1f}" r="2.6"/>'
    return (
        f'<g class="line {curve.key} {_series(curve.place)}" data-label="{escape(curve.label)}">'
        f'<polyline points="{points}"/>{end}{title}</g>'
    )


def _series(place: int) -> str:
    """Colour and dash classes of the series at `place`."""
    return f"s{place % COLOURS} d{place // COLOURS % 4}"


def _end_labels(frame: _Frame, curves: Sequence[Curve]) -> list[str]:
    """Names at the right edge, pushed apart where lines end close together; none where there are too many to read."""
    room = int((frame.inner_bottom - frame.top) / 13)
    if len(curves) > room:
        return []
    wanted = [
        (frame.y(min(curve.points[-1][1], frame.y_high)), curve.label, f"end {curve.key} {_series(curve.place)}")
        for curve in curves
    ]
    parts = []
    for y, (_, label, style) in zip(_spread([w[0] for w in sorted(wanted)], frame), sorted(wanted), strict=True):
        shown = label if len(label) <= 18 else f"{label[:17]}…"
        parts.append(f'<text class="{style}" x="{frame.inner_right + 8:g}" y="{y + 4:.1f}">{escape(shown)}</text>')
    return parts


def _spread(ys: Sequence[float], frame: _Frame, gap: float = 13.0) -> list[float]:
    """Rising positions at least `gap` apart, as near to `ys` (rising) as one pass down and one pass up bring them."""
    placed: list[float] = []
    for y in ys:
        placed.append(max(y, placed[-1] + gap) if placed else max(y, frame.top))
    limit = frame.inner_bottom
    for k in reversed(range(len(placed))):
        placed[k] = min(placed[k], limit)
        limit = placed[k] - gap
    return placed


# bars and intervals -------------------------------------------------------------------------------------------------


def stacked_bar(shares: Mapping[str, float], places: Mapping[str, int], label: str) -> str:
    """One bar, filled from left to right by domain; the name of a domain stands in a part that has room for it."""
    parts = []
    for domain in sorted(shares, key=lambda name: places.get(name, 0)):
        width = 100 * shares[domain]
        parts.append(
            f'<span class="part b{places.get(domain, 0) % COLOURS} h{places.get(domain, 0) // COLOURS % 2}" '
            f'style="width:{width:.2f}%" title="{escape(domain)} {shares[domain]:.1%}">'
            f"{f'{shares[domain]:.0%}' if width >= 7 else ''}</span>"
        )
    words = ", ".join(f"{domain} {share:.1%}" for domain, share in shares.items())
    return f'<div class="bar" role="img" aria-label="{escape(label)}: {escape(words)}">{"".join(parts)}</div>'


def forest_plot(title: str, estimates: Sequence[Estimate]) -> str:
    """Means with intervals, one row each. A seed far worse than all others is an arrow, lest it squeeze them."""
    others = [estimate for estimate in estimates if estimate.role != "seed"] or list(estimates)
    low, high = min(e.low for e in others), max(e.high for e in others)
    seeds = [estimate for estimate in estimates if estimate.role == "seed"]
    if seeds and seeds[0].high - low <= 2.5 * (high - low):
        high = max(high, seeds[0].high)
    margin = 0.05 * (high - low) or 0.05
    low, high = low - margin, high + margin
    left, right, row = 172.0, 600.0, 26.0
    bottom = row * len(estimates) + 8

    def x(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    parts = [
        f'<svg class="chart forest" role="img" aria-labelledby="forest-title" viewBox="0 0 740 {bottom + 30:g}">'
        f'<title id="forest-title">{escape(title)}</title>'
    ]
    for value in ticks(low, high, 6):
        parts.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="4" y2="{bottom:g}"/>')
        parts.append(f'<text class="tick" x="{x(value):.1f}" y="{bottom + 16:g}" text-anchor="middle">{value:g}</text>')
    for k, estimate in enumerate(estimates):
        parts.append(_forest_row(estimate, 8 + row * (k + 0.5), x, (left, right)))
    return "".join([*parts, "</svg>"])


def _forest_row(estimate: Estimate, y: float, x: Callable[[float], float], edges: tuple[float, float]) -> str:
    left, right = edges
    shown = estimate.label if len(estimate.label) <= 22 else f"{estimate.label[:21]}…"
    name = f'<text class="name" x="{left - 14:g}" y="{y + 4:.1f}" text-anchor="end">{escape(shown)}</text>'
    value = (
        f'<text class="value" x="{right + 12:g}" y="{y + 4:.1f}">{estimate.mean:.3f}'
        f'<tspan class="faint"> [{estimate.low:.3f}, {estimate.high:.3f}]</tspan></text>'
    )
    spoken = f"<title>{escape(estimate.label)}: {estimate.mean:.4f}, from {estimate.low:.4f} to {estimate.high:.4f}</title>"
    if x(estimate.mean) > right:
        mark = f'<path class="beyond" d="M{right - 40:g} {y:.1f}H{right:g}m-7 -4.5l7 4.5l-7 4.5"/>'
    else:
        a, b, middle = (x(v) for v in (estimate.low, estimate.high, estimate.mean))
        mark = (
            f'<line x1="{a:.1f}" x2="{b:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<path class="caps" d="M{a:.1f} {y - 4:.1f}v8M{b:.1f} {y - 4:.1f}v8"/>'
            f'<circle cx="{middle:.1f}" cy="{y:.1f}" r="4.5"/>'
        )
    return f'<g class="estimate {estimate.role}">{name}{mark}{value}{spoken}</g>'
