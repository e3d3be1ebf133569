"""Sections of the page about judging: every unit that a loss can be told in, and the variants beside each other before they
were merged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from chrysalis_ray.report.charts import ticks
from chrysalis_ray.report.comparison import SEED, Comparison, Metrics, VariantRow
from chrysalis_ray.report.reading import mapping, number, numbers
from chrysalis_ray.report.sections import cell_of, section_of, table_of

UNITS = (("loss", ".4f"), ("perplexity", ".2f"), ("bits_per_byte", ".4f"), ("accuracy", ".1%"))
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 460.0, 300.0, 52.0, 110.0, 40.0  # of the plot; a name stands to the right of its point
MOST_NAMES = 20  # beyond, names are under the pointer alone
ILL = 1e4  # a condition number from which solving for a merge needs a ridge, as the audit has it


# units --------------------------------------------------------------------------------------------------------------


def metric_tables(comparison: Comparison, shown: Sequence[VariantRow]) -> str:
    """Loss, perplexity, bits per byte and accuracy on select, of every candidate; by domain below."""
    named: list[tuple[str, Metrics]] = [(row.variant_id, row.metrics) for row in shown]
    named += [(row.name, row.metrics) for row in comparison.merges] + [(SEED, comparison.seed_metrics)]
    named = [(name, metrics) for name, metrics in named if metrics]
    if not named:
        return ""
    chosen = comparison.verdict.chosen if comparison.verdict else ""
    rows = [_metric_row(name, _macro(metrics), name == chosen) for name, metrics in named]
    domains = "".join(_domain_table(domain, named, chosen) for domain in comparison.domains)
    note = (
        "On <i>select</i>, each the mean over domains. Perplexity is e to the power of the loss. Bits per byte counts bytes "
        "of the text that was predicted: it compares across tokenizers. Accuracy is the share of tokens that the "
        "model found likeliest (of equals the first)."
    )
    body = table_of("Metrics by candidate", ("variant", *(unit.replace("_", " ") for unit, _ in UNITS)), rows)
    return section_of("In other units", note, f"{body}<details><summary>By domain</summary>{domains}</details>")


def _macro(metrics: Metrics) -> dict[str, float]:
    """The mean over domains of every unit that all of them know; perplexity is that of the mean loss."""
    told = {}
    for unit, _ in UNITS:
        values = [by_unit[unit] for by_unit in metrics.values() if unit in by_unit]
        if len(values) == len(metrics):
            told[unit] = sum(values) / len(values)
    if "loss" in told:
        told["perplexity"] = math.exp(min(told["loss"], 700.0))
    return told


def _metric_row(name: str, told: Mapping[str, float], chosen: bool) -> str:
    cells = "".join(cell_of(told.get(unit), form) for unit, form in UNITS)
    style = " class='chosen'" if chosen else ""
    return f"<tr{style}><th scope='row'>{escape(name)}</th>{cells}</tr>"


def _domain_table(domain: str, named: Sequence[tuple[str, Metrics]], chosen: str) -> str:
    rows = [_metric_row(name, metrics[domain], name == chosen) for name, metrics in named if domain in metrics]
    if not rows:
        return ""
    heads = ("variant", *(unit.replace("_", " ") for unit, _ in UNITS))
    return f"<h3>{escape(domain)}</h3>{table_of(f'Metrics on {domain}', heads, rows)}"


# before merging -----------------------------------------------------------------------------------------------------


def audit_section(comparison: Comparison, shown: Sequence[VariantRow]) -> str:
    """What the variants looked like beside each other: a plot, figures, and what they mean in sentences."""
    audit = comparison.audit
    rows = [mapping(row) for row in audit.get("adapters", ())]
    if len(rows) < 2:
        return ""
    names = [str(row.get("name", "")) for row in rows]
    findings = "".join(f"<li>{escape(str(sentence))}</li>" for sentence in audit.get("findings", ()))
    known = {row.variant_id for row in shown}
    lines = [_audit_row(row, place) for place, row in enumerate(rows) if names[place] in known]
    heads = ("variant", "length of change", "effective rank", "rank", "mean cosine", "modules")
    figure = _pull(names, rows)
    note = (
        "Before anything was merged: the changes that the variants made to the seed, as matrices. What is far from the others, "
        "or points elsewhere, decides what a merge can do."
    )
    body = (
        f"<div class='charts'>{figure}<div>{_audit_facts(audit, len(rows))}</div></div>"
        f"{table_of('Variants before merging', heads, lines)}<ul class='findings'>{findings}</ul>"
    )
    return section_of("Before merging", note, body)


def _audit_row(row: Mapping[str, Any], place: int) -> str:
    cosines = [number(value) for value in row.get("cosines", ())]
    others = [value for other, value in enumerate(cosines) if other != place and value is not None]
    return (
        f"<tr><th scope='row'>{escape(str(row.get('name', '')))}</th>{cell_of(number(row.get('norm')), '.3g')}"
        f"{cell_of(number(row.get('effective_rank')), '.1f')}{cell_of(number(row.get('rank')), '.0f')}"
        f"{cell_of(sum(others) / len(others) if others else None, '+.2f')}{cell_of(number(row.get('modules')), '.0f')}</tr>"
    )


def _audit_facts(audit: Mapping[str, Any], count: int) -> str:
    agreement = numbers(audit.get("agreement"))
    condition = number(audit.get("condition"))
    facts = [
        ("shared input directions", number(audit.get("principal_cosine")), ".2f", "median principal cosine; 1: one cohort"),
        ("where all signs agree", agreement.get("sign_agreement_energy"), ".0%",
         f"of the mean's energy; {number(audit.get('agreement_by_chance')) or 0.0:.0%} by chance for {count}"),
        ("kept by consensus", agreement.get("survived_energy"), ".0%", "of the mean's energy"),
        ("mean held by the rank", number(audit.get("mean_kept_by_rank")), ".0%", "energy of the exact mean"),
        ("condition of a solve", condition, ".1e",
         "a ridge is needed" if condition is not None and condition > ILL else "well-conditioned"),
    ]  # fmt: skip
    told = "".join(
        f"<div><dt>{term}</dt><dd>{format(value, form)}<small>{escape(detail)}</small></dd></div>"
        for term, value, form, detail in facts
        if value is not None
    )
    return f"<dl class='facts'>{told}</dl>"


def _pull(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """How long each variant's change is, by how far it points with the others': who pulls a mean, and whereto."""
    norms = [number(row.get("norm")) for row in rows]
    cosines = [[number(value) for value in row.get("cosines", ())] for row in rows]
    if None in norms or any(len(row) != len(rows) or None in row for row in cosines):
        return ""
    points = [(with_others(place, norms, cosines), norms[place]) for place in range(len(rows))]  # type: ignore[arg-type]
    low, high = min(0.0, *(x for x, _ in points)), max(0.05, *(x for x, _ in points))
    longest = max(length for _, length in points if length is not None) or 1.0
    across, up = (WIDTH - LEFT - RIGHT) / (high - low), (HEIGHT - BOTTOM - 14) / longest
    floor = HEIGHT - BOTTOM
    parts = [
        f'<figure><svg class="chart pull" role="img" aria-labelledby="pull-title" viewBox="0 0 {WIDTH:g} {HEIGHT:g}">',
        '<title id="pull-title">Length of each change by its cosine with the others</title>',
    ]
    for value in ticks(0.0, longest, 4):
        y = floor - value * up
        parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(low, high, 4):
        x = LEFT + (value - low) * across
        parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 15:g}" text-anchor="middle">{value:g}</text>')
    zero = LEFT - low * across
    parts.append(f'<line class="grid" x1="{zero:.1f}" x2="{zero:.1f}" y1="8" y2="{floor:g}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle:g}" y="{HEIGHT - 8:g}" text-anchor="middle">cosine with all others</text>')
    parts.append('<text class="axis" x="4" y="10">length</text>')
    placed = [(LEFT + (x - low) * across, floor - (length or 0.0) * up) for x, length in points]
    heights = label_heights(placed)
    for name, (cosine, length), (x, y), label_y in zip(names, points, placed, heights, strict=True):
        shown = name if len(name) <= 16 else f"{name[:15]}…"
        label = f'<text x="{x + 8:.1f}" y="{label_y + 4:.1f}">{escape(shown)}</text>' if len(names) <= MOST_NAMES else ""
        parts.append(
            f'<g class="point"><circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>{label}'
            f"<title>{escape(name)}: length {length:.3g}, cosine {cosine:+.3f}</title></g>"
        )
    caption = "Far up: pulls a mean most. Far left: points elsewhere than the rest of them together."
    return f"{''.join(parts)}</svg><figcaption>{caption}</figcaption></figure>"


def with_others(place: int, norms: Sequence[float], cosines: Sequence[Sequence[float]]) -> float:
    """Cosine between one change and the sum of all others, from lengths and pairwise cosines; 0 where either is nothing."""
    others = [other for other in range(len(norms)) if other != place]
    along = math.fsum(norms[other] * cosines[place][other] for other in others)
    square = math.fsum(norms[one] * norms[two] * cosines[one][two] for one in others for two in others)
    return along / math.sqrt(square) if square > 0.0 and norms[place] > 0.0 else 0.0


def label_heights(points: Sequence[tuple[float, float]], wide: float = 108.0, high: float = 12.0) -> list[float]:
    """Where the names of points stand: at their height, or as far above it as a name in the way makes them."""
    placed: dict[int, float] = {}
    for place in sorted(range(len(points)), key=lambda place: -points[place][1]):
        x, y = points[place]
        near = sorted((placed[other] for other in placed if abs(points[other][0] - x) < wide), reverse=True)
        for taken in near:
            if abs(taken - y) < high:
                y = taken - high
        placed[place] = y
    return [placed[place] for place in range(len(points))]
