"""Sections of the page about judging: every unit that a loss can be told in, and the variants beside each other before they
were merged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from chrysalis_ray.report.comparison import SEED, Comparison, Metrics, VariantRow
from chrysalis_ray.report.reading import mapping, number, numbers
from chrysalis_ray.report.sections import _cell, _section, _table

UNITS = (("loss", ".4f"), ("perplexity", ".2f"), ("bits_per_byte", ".4f"), ("accuracy", ".1%"))
WIDTH, HEIGHT, EDGE, ROOM = 440.0, 300.0, 30.0, 90.0  # of the map, its margin, and what a name takes beside its point
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
        "of the text that was predicted: it compares across tokenizers. Accuracy is the share of tokens than which the model "
        "found none likelier."
    )
    body = _table("Metrics by candidate", ("variant", *(unit.replace("_", " ") for unit, _ in UNITS)), rows)
    return _section("In other units", note, f"{body}<details><summary>By domain</summary>{domains}</details>")


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
    cells = "".join(_cell(told.get(unit), form) for unit, form in UNITS)
    style = " class='chosen'" if chosen else ""
    return f"<tr{style}><th scope='row'>{escape(name)}</th>{cells}</tr>"


def _domain_table(domain: str, named: Sequence[tuple[str, Metrics]], chosen: str) -> str:
    rows = [_metric_row(name, metrics[domain], name == chosen) for name, metrics in named if domain in metrics]
    if not rows:
        return ""
    heads = ("variant", *(unit.replace("_", " ") for unit, _ in UNITS))
    return f"<h3>{escape(domain)}</h3>{_table(f'Metrics on {domain}', heads, rows)}"


# before merging -----------------------------------------------------------------------------------------------------


def audit_section(comparison: Comparison, shown: Sequence[VariantRow]) -> str:
    """What the variants looked like beside each other: a map, figures, and what they mean in sentences."""
    audit = comparison.audit
    rows = [mapping(row) for row in audit.get("adapters", ())]
    if len(rows) < 2:
        return ""
    names = [str(row.get("name", "")) for row in rows]
    findings = "".join(f"<li>{escape(str(sentence))}</li>" for sentence in audit.get("findings", ()))
    known = {row.variant_id for row in shown}
    lines = [_audit_row(row, place) for place, row in enumerate(rows) if names[place] in known]
    heads = ("variant", "length of change", "effective rank", "rank", "mean cosine", "modules")
    figure = _map(names, mapping(audit.get("map")))
    note = (
        "Before anything was merged: the changes that the variants made to the seed, as matrices. What is far from the others, "
        "or points elsewhere, decides what a merge can do."
    )
    body = (
        f"<div class='charts'>{figure}<div>{_audit_facts(audit, len(rows))}</div></div>"
        f"{_table('Variants before merging', heads, lines)}<ul class='findings'>{findings}</ul>"
    )
    return _section("Before merging", note, body)


def _audit_row(row: Mapping[str, Any], place: int) -> str:
    cosines = [number(value) for value in row.get("cosines", ())]
    others = [value for other, value in enumerate(cosines) if other != place and value is not None]
    return (
        f"<tr><th scope='row'>{escape(str(row.get('name', '')))}</th>{_cell(number(row.get('norm')), '.3g')}"
        f"{_cell(number(row.get('effective_rank')), '.1f')}{_cell(number(row.get('rank')), '.0f')}"
        f"{_cell(sum(others) / len(others) if others else None, '+.2f')}{_cell(number(row.get('modules')), '.0f')}</tr>"
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


def _map(names: Sequence[str], places: Mapping[str, Any]) -> str:
    """The plane that shows most of the changes, the seed where the axes cross."""
    xs, ys = ([number(value) for value in places.get(axis, ())] for axis in ("x", "y"))
    points = [(name, x, y) for name, x, y in zip(names, xs, ys, strict=False) if x is not None and y is not None]
    if len(points) != len(names):
        return ""
    across, up = ((min(0.0, *values), max(0.0, *values)) for values in ([x for _, x, _ in points], [y for _, _, y in points]))
    # one scale for both axes: lengths and angles are what the map is about
    scale = min((WIDTH - 2 * EDGE - ROOM) / (across[1] - across[0] or 1.0), (HEIGHT - 2 * EDGE) / (up[1] - up[0] or 1.0))
    placed = [(name, EDGE + (x - across[0]) * scale, HEIGHT - EDGE - (y - up[0]) * scale) for name, x, y in points]
    zero_x, zero_y = EDGE - across[0] * scale, HEIGHT - EDGE + up[0] * scale
    labels = _apart([y for _, _, y in placed])
    parts = [
        f'<figure><svg class="chart map" role="img" aria-labelledby="map-title" viewBox="0 0 {WIDTH:g} {HEIGHT:g}">',
        '<title id="map-title">Map of the variants, seen from the seed</title>',
        f'<path class="grid" d="M8 {zero_y:.1f}H{WIDTH - 8:g}M{zero_x:.1f} 8V{HEIGHT - 8:g}"/>',
    ]
    for (name, x, y), label_y in zip(placed, labels, strict=True):
        parts.append(
            f'<g class="point"><line x1="{zero_x:.1f}" y1="{zero_y:.1f}" x2="{x:.1f}" y2="{y:.1f}"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/><text x="{x + 8:.1f}" y="{label_y + 4:.1f}">{escape(name[:18])}</text>'
            f"<title>{escape(name)}: {math.hypot(x - zero_x, y - zero_y) / scale:.3g} from the seed in this plane</title></g>"
        )
    parts.append(f'<circle class="seed" cx="{zero_x:.1f}" cy="{zero_y:.1f}" r="5"/></svg>')
    share = number(places.get("share")) or 0.0
    parts.append(
        f"<figcaption>The seed is where the axes cross; this plane shows {share:.0%} of all change.</figcaption></figure>"
    )
    return "".join(parts)


def _apart(ys: Sequence[float], gap: float = 12.0) -> list[float]:
    """Heights of labels, each as near to its own as the one above it allows."""
    placed = list(ys)
    above = -math.inf
    for place in sorted(range(len(ys)), key=lambda place: ys[place]):
        above = placed[place] = max(ys[place], above + gap)
    return placed
