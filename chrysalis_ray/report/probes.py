"""Probe tasks on the page, in the card, in a terminal and in W&B: right answers, as the verdict tells them."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from chrysalis_ray.report.reading import mapping, number
from chrysalis_ray.report.sections import section_of, table_of

SHARE = "share right"


def shares_of(probe: Mapping[str, Any]) -> list[tuple[str, float, float, float]]:
    """(candidate, share right, low, high), the best first."""
    rows = []
    for name, value in mapping(probe.get("candidates")).items():
        found = [number(mapping(value).get(key)) for key in ("accuracy", "low", "high")]
        if None not in found:
            rows.append((str(name), *found))
    return sorted(rows, key=lambda row: (-row[1], row[0]))  # type: ignore[arg-type]


def how(probe: Mapping[str, Any]) -> str:
    """``multiple_choice by likelihood, 40 items``"""
    return f"{probe.get('kind', '')} by {probe.get('by', '')}, {probe.get('items', 0)} items"


def probe_section(probes: Mapping[str, Mapping[str, Any]], chosen: str) -> str:
    """A table for every probe; an empty text where there are none."""
    tables = []
    for name, probe in probes.items():
        rows = [_row(*shares, " class='chosen'" if shares[0] == chosen else "") for shares in shares_of(probe)]
        against = "".join(f"<li>{escape(_difference(mapping(each)))}</li>" for each in probe.get("differences", ()))
        tables.append(
            f"<h3>{escape(name)}</h3><p class='note'>{escape(how(probe))}</p>"
            f"{table_of(f'Probe {name}', ('variant', SHARE, 'from', 'to'), rows)}<ul class='findings'>{against}</ul>"
        )
    note = "Questions with answers, asked of the seed, every variant and every merge. The items told here chose nothing."
    return section_of("Probes", note, "".join(tables)) if tables else ""


def _row(candidate: str, share: float, low: float, high: float, style: str) -> str:
    cells = "".join(f"<td data-v='{value!r}'>{value:.1%}</td>" for value in (share, low, high))
    return f"<tr{style}><th scope='row'>{escape(candidate)}</th>{cells}</tr>"


def _difference(each: Mapping[str, Any]) -> str:
    mean, low, high = (number(each.get(key)) or 0.0 for key in ("mean", "low", "high"))
    return f"{each.get('of')} against {each.get('against')}: {mean:+.1%}, interval {low:+.1%} to {high:+.1%}"


def probe_rows(probes: Mapping[str, Mapping[str, Any]], candidate: str) -> list[list[str]]:
    """(probe, how, share right with its interval) of one candidate and of the seed, for a table of a card."""
    rows = []
    for name, probe in probes.items():
        told = {own: f"{share:.1%} [{low:.1%}, {high:.1%}]" for own, share, low, high in shares_of(probe)}
        rows.append([name, how(probe), told.get(candidate, "-"), told.get("seed", "-")])
    return rows


def probe_metrics(probes: Mapping[str, Mapping[str, Any]], candidate: str) -> dict[str, float]:
    """``probe/<name>`` -> share right of one candidate."""
    return {f"probe/{name}": share for name, probe in probes.items() for own, share, *_ in shares_of(probe) if own == candidate}
