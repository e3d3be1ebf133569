"""The grid of `ridge.py` as hand-written SVG: the packed step and its law, and what packing gains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, PANEL_WIDTH, PANEL_HEIGHT, GAP = 980, 420, 70, 70, 370, 270, 110
MILLISECONDS = [digit * 10.0**power for power in range(-1, 6) for digit in (1, 3)]
LAWS = {"sum": "launch + work", "roofline": "the larger of launch and work"}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


class Panel:
    """Two axes, each in powers of two or ten, and what is drawn between them."""

    def __init__(self, left: float, x: Sequence[float], y: Sequence[float]) -> None:
        self.left = left
        self.x_low, self.x_high = math.log2(min(x)) - 0.3, math.log2(max(x)) + 0.3
        self.y_low, self.y_high = math.log2(min(y)) - 0.3, math.log2(max(y)) + 0.3
        self.parts = [f'<rect x="{left}" y="{TOP}" width="{PANEL_WIDTH}" height="{PANEL_HEIGHT}" class="frame"/>']

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - self.x_low) / (self.x_high - self.x_low)
        up = (math.log2(y) - self.y_low) / (self.y_high - self.y_low)
        return self.left + across * PANEL_WIDTH, TOP + (1 - up) * PANEL_HEIGHT

    def line(self, points: Sequence[tuple[float, float]], colour: str, dashed: bool = False) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}/>')

    def dots(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        for point in points:
            x, y = self.at(*point)
            self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="{colour}"/>')

    def text(self, x: float, y: float, words: str, anchor: str = "middle", extra: str = "") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{words}</text>')

    def ticks(self, title: str, side: str, marks: Sequence[float], words: Callable[[float], str]) -> None:
        for mark in marks:
            x, y = self.at(mark, mark) if mark > 0 else (0.0, 0.0)
            if side == "x" and self.left <= x <= self.left + PANEL_WIDTH:
                self.parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + PANEL_HEIGHT}" class="grid"/>')
                self.text(x, TOP + PANEL_HEIGHT + 17, words(mark))
            if side == "y" and TOP <= y <= TOP + PANEL_HEIGHT:
                right = self.left + PANEL_WIDTH
                self.parts.append(f'<line x1="{self.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
                self.text(self.left - 7, y + 4, words(mark), "end")
        if side == "x":
            self.text(self.left + PANEL_WIDTH / 2, TOP + PANEL_HEIGHT + 38, title)
        else:
            self.text(self.left, TOP - 10, title, "start")


def draw(base: dict[str, Any], device: str) -> str:
    """One page with two panels for the grid of one base."""
    cells = base["cells"]
    lanes = sorted({row["tokens_per_lane"] for row in cells})
    colour = dict(zip(lanes, COLOURS, strict=False))
    left, right = _steps(base, lanes, colour), _gains(cells, lanes, colour)
    legend = "".join(
        f'<circle cx="{LEFT + 8 + 170 * place}" cy="{HEIGHT - 12}" r="3.6" fill="{colour[lane]}"/>'
        f'<text x="{LEFT + 18 + 170 * place}" y="{HEIGHT - 8}">{lane:,} tokens per lane</text>'
        for place, lane in enumerate(lanes)
    )
    title = (
        f"{base['base']} on {device}: {LAWS[base['pace']['kind']]}, launch {1000 * base['pace']['launch']:.1f} ms, "
        f"ridge at {base['ridge_tokens']:,} tokens"
    )
    style = (
        "text{font:12px sans-serif;fill:#333}.frame{fill:none;stroke:#888}.grid{stroke:#ddd;stroke-width:1}"
        "@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#444}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f'<style>{style}</style><text x="{LEFT}" y="26" style="font-size:15px">{title}</text>'
        f"{''.join(left.parts)}{''.join(right.parts)}{legend}</svg>\n"
    )


def _steps(base: dict[str, Any], lanes: Sequence[int], colour: dict[int, str]) -> Panel:
    """Milliseconds of a packed step over all its tokens; dots as measured, lines as fitted, the ridge upright."""
    cells = base["cells"]
    tokens = [row["variants"] * row["tokens_per_lane"] for row in cells]
    times = [row[side] for row in cells for side in ("packed_ms", "fitted_ms")]
    panel = Panel(LEFT, [*tokens, max(base["ridge_tokens"], 1)], times)
    panel.ticks("tokens in one packed step", "x", [4.0**power for power in range(12)], lambda mark: f"{mark:,.0f}")
    panel.ticks("ms per packed step of all variants", "y", MILLISECONDS, lambda mark: f"{mark:g}")
    for lane in lanes:
        own = sorted((row for row in cells if row["tokens_per_lane"] == lane), key=lambda row: row["variants"])
        panel.line([(row["variants"] * lane, row["fitted_ms"]) for row in own], colour[lane], dashed=True)
        panel.dots([(row["variants"] * lane, row["packed_ms"]) for row in own], colour[lane])
    x, _ = panel.at(base["ridge_tokens"], 1.0)
    panel.parts.append(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + PANEL_HEIGHT}" stroke="#a00" stroke-width="1.4"/>'
    )
    panel.text(x + 5, TOP + 14, "ridge", "start", ' style="fill:#a00"')
    return panel


def _gains(cells: Sequence[dict[str, Any]], lanes: Sequence[int], colour: dict[int, str]) -> Panel:
    """Times that a pack is faster than one variant after the other, over the variants; 1 is a line of its own."""
    panel = Panel(LEFT + PANEL_WIDTH + GAP, [row["variants"] for row in cells], [1.0, *(row["gain"] for row in cells)])
    panel.ticks("variants in the pack", "x", [2.0**power for power in range(12)], lambda mark: f"{mark:g}")
    panel.ticks("times faster than sequential PEFT", "y", [0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 16, 32], lambda mark: f"{mark:g}")
    for lane in lanes:
        own = sorted((row for row in cells if row["tokens_per_lane"] == lane), key=lambda row: row["variants"])
        panel.line([(row["variants"], row["gain"]) for row in own], colour[lane])
        panel.dots([(row["variants"], row["gain"]) for row in own], colour[lane])
    low, high = min(row["variants"] for row in cells), max(row["variants"] for row in cells)
    panel.line([(low, 1.0), (high, 1.0)], "#888", dashed=True)
    return panel
