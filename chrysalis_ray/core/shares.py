"""From an epigenome to shares: how much of a variant's rows each domain gets, and when. Pure functions, without numpy.

In this order, each step a function of its own:

    level x prior        `prior_weights`; normalised: what was asked for
    replay               a part of all rows is drawn by other levels
    floors and caps      `bounded`: the nearest shares to what was asked that keep both
    rounding             `in_block`: whole draws in a block of 4096 rows, by largest remainder; or, where there are floors or
                         caps, or a share that rounds to none of 4096, whole draws of all rows up to a horizon (`apportioned`)

`schedule` does so for every segment of a schedule, from its start to the next change of levels. A segment never depends on
what is appended after it, so the past stays as it was. A mix that does not say how many rows its domains hold (`rows`) was
branched before caps were exact, and is drawn as it was then: by blocks, its epochs counted in tokens.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from chrysalis_ray.core.apportioned import apportioned, first_draws, rows_of_epochs
from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.records import Epigenome

BLOCK = 4096
MOST_LEVEL = 1e12  # sums of larger ones are no numbers any more
PRIORS = ("uniform", "size", "temperature(T)", "unimax(EPOCHS)")
_PRIOR = re.compile(r"(uniform|size)|(temperature|unimax)\(\s*([0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?)\s*\)")

Shares = dict[str, float]


@dataclass(frozen=True)
class Segment:
    """From row `start` on, to the next segment: the share of every domain, and the most that the caps allow some. `quotas` are
    whole draws of the rows up to a horizon, which they sum to; without them draws are of blocks."""

    start: int
    shares: Mapping[str, float]
    most: Mapping[str, float] = field(default_factory=dict)
    quotas: Mapping[str, int] = field(default_factory=dict)


# priors -------------------------------------------------------------------------------------------------------------


def parse_prior(prior: str) -> tuple[str, float]:
    """A prior's kind and its number (0 where it has none). Raises GenomeError for one that is not known."""
    found = _PRIOR.fullmatch(prior.strip())
    number = float(found[3]) if found and found[3] else 0.0
    if found is None or (found[2] and not (math.isfinite(number) and number > 0.0)):
        raise GenomeError(f"unknown prior {prior!r}", f"use one of {', '.join(PRIORS)}, with a number above 0")
    return found[1] or found[2], number


def prior_weights(prior: str, tokens: Mapping[str, int | float], budget_tokens: float) -> Shares:
    """Weight of every domain before its level, from its tokens n. Domains without tokens weigh nothing.

    ``uniform`` 1; ``size`` n; ``temperature(T)`` (n / largest n)^(1/T), between ``size`` (T = 1) and ``uniform`` (T -> inf)
    (Arivazhagan et al., arXiv 1907.05019); ``unimax(N)`` equal tokens for all as far as N epochs of each reach (`unimax`).
    """
    kind, number = parse_prior(prior)
    if kind == "unimax":
        return unimax(tokens, number, budget_tokens)
    if kind == "temperature":
        most = max([size for size in tokens.values() if size > 0], default=1)  # as parts of it, powers stay numbers
        return {domain: (size / most) ** (1.0 / number) if size > 0 else 0.0 for domain, size in tokens.items()}
    return {domain: float(size) if kind == "size" else float(size > 0) for domain, size in tokens.items()}


def unimax(tokens: Mapping[str, int | float], epochs: float, budget_tokens: float) -> Shares:
    """UniMax (Chung et al., arXiv 2304.09151, algorithm 1): tokens of each domain. The smallest first takes its equal part of
    the budget that is left, but no more than `epochs` passes. What no domain can take any more is left over."""
    left, given = float(budget_tokens), {}
    ascending = sorted((size, domain) for domain, size in tokens.items() if size > 0)
    for place, (size, domain) in enumerate(ascending):
        given[domain] = min(left / (len(ascending) - place), epochs * size)
        left -= given[domain]
    return {domain: given.get(domain, 0.0) for domain in tokens}


# shares -------------------------------------------------------------------------------------------------------------


def asked(epigenome: Epigenome, levels: Mapping[str, float], tokens: Mapping[str, int | float]) -> Shares:
    """(1 - rho) x level x prior + rho x replay level x prior, both normalised; rho is `replay_share`.

    UniMax divides the budget among the domains that are expressed. Raises GenomeError for a mix of nothing.
    """
    mix = _normalised(epigenome, levels, tokens)
    if not epigenome.replay_share:
        return mix
    again, part = _normalised(epigenome, epigenome.replay, tokens), epigenome.replay_share
    return {domain: (1.0 - part) * mix[domain] + part * again[domain] for domain in mix}


def _normalised(epigenome: Epigenome, levels: Mapping[str, float], tokens: Mapping[str, int | float]) -> Shares:
    _check_levels(levels, tokens)
    sizes = _sizes(epigenome, tokens)
    heard = {domain: sizes[domain] for domain in sorted(tokens) if levels.get(domain, 0.0) > 0.0}
    prior = prior_weights(epigenome.prior, heard, float(epigenome.budget_rows * epigenome.row_tokens))
    weights = {domain: levels.get(domain, 0.0) * prior.get(domain, 0.0) for domain in sorted(tokens)}
    total = math.fsum(weights.values())
    if not total > 0.0:
        raise GenomeError(
            f"the mix {dict(levels)} expresses nothing: every level is 0 or stands at a domain without tokens",
            f"raise the level of one of {', '.join(sorted(tokens))}",
        )
    return {domain: weight / total for domain, weight in weights.items()}


def _sizes(epigenome: Epigenome, tokens: Mapping[str, int | float]) -> Shares:
    """What a prior knows of every domain: its tokens; where epochs are counted of rows, the room of its rows, padding too."""
    if epigenome.rows and parse_prior(epigenome.prior)[0] == "unimax":
        return {domain: float(held_rows(epigenome, domain) * epigenome.row_tokens) for domain in tokens}
    return {domain: size * epigenome.kept for domain, size in tokens.items()}


def held_rows(epigenome: Epigenome, domain: str) -> int:
    """The rows of a domain that are drawn at all, once an epoch."""
    rows = epigenome.rows.get(domain, 0)
    return rows if epigenome.kept == 1.0 else min(rows, max(1, math.ceil(epigenome.kept * rows)))


def _check_levels(levels: Mapping[str, float], tokens: Mapping[str, int | float]) -> None:
    for domain, level in levels.items():
        if domain not in tokens:
            near = difflib.get_close_matches(domain, tokens, n=1)
            raise GenomeError(
                f"the mix expresses {domain!r}, which the genome lacks" + (f"; did you mean {near[0]!r}?" if near else ""),
                f"domains of this genome: {', '.join(sorted(tokens))}",
            )
        if not 0.0 <= level <= MOST_LEVEL:
            raise GenomeError(
                f"the mix expresses {domain!r} at level {level!r}", f"a level is a number from 0 to {MOST_LEVEL:g}"
            )


def bounded(shares: Mapping[str, float], least: Mapping[str, float], most: Mapping[str, float]) -> Shares:
    """The shares s nearest to the asked a, by Kullback-Leibler divergence sum s ln(s / a), with least <= s <= most and sum 1.

    s = min(most, max(least, x a)), one x for all domains (the Karush-Kuhn-Tucker conditions of that projection; Csiszar,
    "I-divergence geometry", 1975). Where all that is allowed does not sum to 1, everyone stands at `most`, scaled up alike; a
    least share above the most is lowered to it.
    """
    if all(least.get(domain, 0.0) <= share <= most.get(domain, 1.0) for domain, share in shares.items()):
        return dict(shares)
    heard = [domain for domain, share in shares.items() if share > 0.0 or least.get(domain, 0.0) > 0.0]
    high = {domain: min(1.0, max(0.0, most.get(domain, 1.0))) for domain in heard}
    low = {domain: min(least.get(domain, 0.0), high[domain]) for domain in heard}
    high |= {domain: low[domain] for domain in heard if not shares[domain] > 0.0}  # x times nothing stays at its floor
    if (room := math.fsum(high.values())) <= 1.0:
        return {domain: high.get(domain, 0.0) / room if room > 0.0 else share for domain, share in shares.items()}
    if (need := math.fsum(low.values())) >= 1.0:
        return {domain: low.get(domain, 0.0) / need for domain in shares}
    x = _multiplier({domain: shares[domain] for domain in heard if shares[domain] > 0.0}, low, high, need)
    return {
        domain: min(high[domain], max(low[domain], x * share)) if domain in high else 0.0 for domain, share in shares.items()
    }


def _multiplier(shares: Mapping[str, float], low: Mapping[str, float], high: Mapping[str, float], need: float) -> float:
    """x for which the bounded shares sum to 1: the sum rises in x, and is linear between two ends of a domain."""
    silent = need - math.fsum(low[domain] for domain in shares)  # floors of domains that were not asked for
    ends = sorted({bound[domain] / share for domain, share in shares.items() for bound in (low, high)})

    def total(x: float) -> float:
        return silent + math.fsum(min(high[domain], max(low[domain], x * share)) for domain, share in shares.items())

    below, above = 0, len(ends) - 1
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if total(ends[middle]) < 1.0 else (below, middle)
    first, last = total(ends[below]), total(ends[above])
    return ends[below] + (ends[above] - ends[below]) * (1.0 - first) / (last - first) if last > first else ends[above]


def in_block(shares: Mapping[str, float], most: Mapping[str, float] | None = None) -> dict[str, int]:
    """Draws of every domain in a block of 4096 rows, by largest remainder; ties go to the name that sorts first.

    `shares` need not sum to 1. No domain is rounded up beyond its `most` while another that has a share has room.
    """
    return apportioned(shares, BLOCK, {domain: part * BLOCK for domain, part in (most or {}).items()})


# schedules ----------------------------------------------------------------------------------------------------------


def levels_at(epigenome: Epigenome, row: int) -> dict[str, float]:
    """The level of every domain at a row: of what names it up to there, the last; of a stage and a change at one row, the
    change."""
    levels = dict(epigenome.express)
    for change in sorted((*epigenome.stages, *epigenome.changes), key=lambda change: change.row):
        if change.row <= row:
            levels.update(change.express)
    return levels


def schedule(epigenome: Epigenome, tokens: Mapping[str, int | float]) -> tuple[Segment, ...]:
    """The shares of every segment, from row 0 on. A mix without stages and changes has one.

    A cap of E epochs of a domain with n rows is a room of floor(E n) rows, less what was drawn before, out of the rows up to a
    horizon. The horizon ends with the stage, or with the budget: it is known when the segment begins. Draws are whole quotas of
    those rows, none beyond its room, so that no cap is ever passed. Only where all domains together have less room than there
    are rows (`check_bounds` refuses that) do all get more, alike. Raises GenomeError for a level that is no number of at least
    0 or stands at a domain that the genome lacks, and for a mix of nothing.
    """
    counted = epigenome.caps or epigenome.rows or parse_prior(epigenome.prior)[0] == "unimax"
    if counted and not epigenome.budget_rows * epigenome.row_tokens:
        raise GenomeError(
            "caps and the prior unimax count epochs of a budget, and this mix knows none", "give it `budget_rows`"
        )
    end = epigenome.budget_rows or math.inf
    starts = sorted({0, *(change.row for change in (*epigenome.stages, *epigenome.changes))})
    starts = [start for start in starts if start < end]
    ends = [*sorted(stage.row for stage in epigenome.stages), end]
    drawn = dict.fromkeys(tokens, 0.0)  # rows of each capped domain so far
    segments = []
    for start, stop in zip(starts, [*starts[1:], end], strict=True):
        wanted = asked(epigenome, levels_at(epigenome, start), tokens)
        horizon = min(after for after in ends if after > start) - start
        make = _whole_segment if epigenome.rows else _segment_of_blocks
        segment = make(epigenome, tokens, wanted, start, horizon, drawn)
        for domain, rows in _drawn_of(segment, stop - start).items() if segment.most else ():
            drawn[domain] += rows
        segments.append(segment)
    return tuple(segments)


def _whole_segment(
    epigenome: Epigenome,
    tokens: Mapping[str, int | float],
    wanted: Shares,
    start: int,
    horizon: float,
    drawn: Mapping[str, float],
) -> Segment:
    """Draws are whole quotas of the rows up to the horizon, unless blocks do as well: there are no floors and caps to keep, and
    every domain has its part of each block, and of the horizon a row."""
    capped = {domain: epochs for domain, epochs in epigenome.caps.items() if domain in tokens}
    room = {d: max(0.0, rows_of_epochs(epochs, held_rows(epigenome, d)) - drawn[d]) for d, epochs in capped.items()}
    most = {domain: rows / horizon for domain, rows in room.items()}
    shares = bounded(wanted, _floors(epigenome, tokens), most)
    counts = in_block(shares)
    if not (room or epigenome.floors) and all(count and count * horizon >= BLOCK for count in counts.values()):
        return Segment(start, shares)
    quotas = apportioned(shares, int(horizon), room)
    return Segment(start, {domain: quotas.get(domain, 0) / horizon for domain in tokens}, most, quotas)


def _segment_of_blocks(
    epigenome: Epigenome,
    tokens: Mapping[str, int | float],
    wanted: Shares,
    start: int,
    horizon: float,
    drawn: Mapping[str, float],
) -> Segment:
    """As draws were before caps were exact: shares under caps are whole 4096ths, and a cap may be missed by two rows. In force
    for mixes that were branched then."""
    room = {d: tokens[d] * epigenome.kept / epigenome.row_tokens for d in epigenome.caps if d in tokens}
    most = {d: max(0.0, epigenome.caps[d] * size - drawn[d]) / horizon for d, size in room.items()}
    shares = bounded(wanted, _floors(epigenome, tokens), most)
    if most:
        counts = in_block(shares, most)
        shares = {domain: counts.get(domain, 0) / BLOCK for domain in tokens}
    return Segment(start, shares, most)


def _floors(epigenome: Epigenome, tokens: Mapping[str, int | float]) -> Shares:
    return {domain: least for domain, least in epigenome.floors.items() if tokens.get(domain, 0) > 0}


def _drawn_of(segment: Segment, rows: float) -> dict[str, float]:
    """Rows of each domain in the first `rows` of a segment."""
    if not segment.quotas:
        return {domain: share * rows for domain, share in segment.shares.items()}
    names = sorted(segment.quotas)
    counts = first_draws([segment.quotas[name] for name in names], int(rows))
    return {name: float(count) for name, count in zip(names, counts, strict=True)}


def shares_of(epigenome: Epigenome, tokens: Mapping[str, int | float]) -> Shares:
    """Share of every domain of the genome at the first row: level x prior, within floors and caps, summing to 1.

    A domain that `express` does not name is silent (level 0), as is one without tokens. Raises GenomeError as `schedule`.
    """
    return dict(schedule(epigenome, tokens)[0].shares)


def mean_shares(segments: Sequence[Segment], rows: int) -> Shares:
    """The share of every domain in the first `rows` rows of a schedule; at row 0, what it begins with."""
    mean: Shares = {}
    for segment, stop in zip(segments, [*(after.start for after in segments[1:]), math.inf], strict=True):
        length = min(max(rows, 1), stop) - segment.start
        for domain, share in segment.shares.items() if length > 0 else ():
            mean[domain] = mean.get(domain, 0.0) + share * length / max(rows, 1)
    return mean


def unheard(epigenome: Epigenome, tokens: Mapping[str, int | float]) -> dict[str, str]:
    """Domains that a mix asks for and that its whole training never draws, each with the reason: it comes to less than a row.
    Nothing for a mix that does not know its rows."""
    wanted, drawn = dict.fromkeys(tokens, 0.0), dict.fromkeys(tokens, 0.0)
    segments = schedule(epigenome, tokens) if epigenome.rows else ()
    for segment, stop in zip(segments, [*(after.start for after in segments[1:]), epigenome.budget_rows], strict=False):
        rows = stop - segment.start
        for domain, share in asked(epigenome, levels_at(epigenome, segment.start), tokens).items():
            wanted[domain] += share * rows
        for domain, count in _drawn_of(segment, rows).items():
            drawn[domain] += count
    return {domain: _why_not(epigenome, domain, rows) for domain, rows in wanted.items() if rows > 0.0 and not drawn[domain]}


def _why_not(epigenome: Epigenome, domain: str, rows: float) -> str:
    held, cap = held_rows(epigenome, domain), epigenome.caps.get(domain)
    if cap is not None and not rows_of_epochs(cap, held):
        return f"its cap of {cap:g} epochs of {held} rows is less than a row"
    return f"its part of {epigenome.budget_rows} rows is {rows:.2g} of a row"


def check_bounds(epigenome: Epigenome, tokens: Mapping[str, int | float], who: str) -> None:
    """Raises GenomeError where the genome is too small for the caps of a mix, or a floor asks for more than a cap allows."""
    for segment in schedule(epigenome, tokens):
        for domain, least in epigenome.floors.items():
            if least > segment.most.get(domain, 1.0):
                raise GenomeError(
                    f"{who}: the floor of {domain!r} is {least:.4g} of the rows, but its cap of "
                    f"{epigenome.caps[domain]:g} epochs is {segment.most[domain]:.4g} of them from row {segment.start} on",
                    "lower the floor, raise the cap, or train on fewer tokens",
                )
        loud = (levels_at(epigenome, segment.start), epigenome.replay if epigenome.replay_share else {})
        told = [domain for domain in tokens if tokens[domain] > 0 and any(levels.get(domain, 0.0) > 0.0 for levels in loud)]
        kept = {domain: least for domain, least in epigenome.floors.items() if domain not in told and tokens.get(domain, 0) > 0}
        heard = [*told, *kept]  # a domain that nobody asked for gets its floor and no more
        room = math.fsum(segment.most.get(domain, 1.0) for domain in told) + math.fsum(kept.values())
        if room < 1.0 - 1e-9:
            raise GenomeError(
                f"{who}: the caps allow {room:.4g} of the rows from row {segment.start} on: all domains together hold too "
                f"little text ({', '.join(f'{d} {tokens[d]:.0f} tokens' for d in heard)})",
                "raise the caps, express more domains, or train on fewer tokens",
            )
