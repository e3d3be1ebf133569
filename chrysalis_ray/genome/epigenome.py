"""Operators on the epigenome: pure functions from mixes to a mix. None of them can reach the genome.

An epigenome is a level in [0, inf) per domain; only the ratios of levels matter to a variant (`core.shares`). Laws, each
kept by a property test:

    dim and brighten      dim(e, d, x) = brighten(e, d, 1/x); brighten by a then b = by a b; by 1 = identity
    silence               idempotent; commutes with every other operator on other domains
    swap                  its own inverse; symmetric in its two domains
    normalise             idempotent; shares unchanged; levels sum to the number of domains that are expressed
    crossover             crossover(e, e) = e in shares; symmetric at 1/2; the ends are the parents
    mutate                deterministic in its generator; strength 0 = identity; silent domains stay silent
    appended              the past stays: no share and no draw before the row changes; appending what holds is identity

Levels that an operator does not name stay as they are, and a domain that is not expressed is at level 0. Operators change the
levels that a mix begins with, and nothing else of it; `appended` makes levels hold from a row on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.records import Change, Epigenome
from chrysalis_ray.core.shares import levels_at

if TYPE_CHECKING:
    import numpy as np


def brighten(epigenome: Epigenome, domain: str, factor: float) -> Epigenome:
    """`domain` `factor` times as loud. Raises GenomeError for a domain that is not there and for a factor that is no positive
    number."""
    if not (math.isfinite(factor) and factor > 0.0):
        raise GenomeError(
            f"{domain!r} cannot be made {factor!r} times as loud", "use a positive number; `silence` turns it off"
        )
    return _with(epigenome, {domain: _level(epigenome, domain) * factor})


def dim(epigenome: Epigenome, domain: str, factor: float) -> Epigenome:
    """`domain` `factor` times as quiet."""
    if factor == 0.0:
        raise GenomeError(f"{domain!r} cannot be made 0 times as quiet", "use a positive number")
    return brighten(epigenome, domain, 1.0 / factor)


def silence(epigenome: Epigenome, domain: str) -> Epigenome:
    """`domain` at level 0. Raises GenomeError where nothing would be left."""
    _level(epigenome, domain)
    return _with(epigenome, {domain: 0.0})


def swap(epigenome: Epigenome, one: str, other: str) -> Epigenome:
    """The levels of two domains exchanged."""
    return _with(epigenome, {one: _level(epigenome, other), other: _level(epigenome, one)})


def normalise(epigenome: Epigenome) -> Epigenome:
    """The same mix with levels whose mean, over the domains that are expressed, is 1; those of its schedule alike."""
    total = math.fsum(epigenome.express.values())
    heard = sum(level > 0.0 for level in epigenome.express.values())
    if not (math.isfinite(total) and total > 0.0):
        raise GenomeError(f"the mix {dict(epigenome.express)} expresses nothing", "raise a level")

    def scaled(levels: Mapping[str, float]) -> dict[str, float]:
        return {domain: level * heard / total for domain, level in levels.items()}

    stages = tuple(Change(stage.row, scaled(stage.express)) for stage in epigenome.stages)
    changes = tuple(Change(change.row, scaled(change.express)) for change in epigenome.changes)
    return replace(_with(epigenome, scaled(epigenome.express)), stages=stages, changes=changes)


def crossover(one: Epigenome, other: Epigenome, weight: float = 0.5) -> Epigenome:
    """A mix between two: the squared weighted mean of the square roots of their levels, each summing to 1; `weight` is that of
    `other`.

    It is the point between them on the sphere of square roots (Hellinger geometry): it changes most where a share is small,
    which is where a change of share matters most. Both must agree in all but their levels and have no schedule; the
    result is normalised.
    """
    if one.prior != other.prior:
        raise GenomeError(f"mixes of prior {one.prior!r} and {other.prior!r} cannot be crossed", "give both the same prior")
    if replace(one, express={}) != replace(other, express={}):
        raise GenomeError(
            "mixes that differ in more than their levels cannot be crossed", "give both the same floors, caps, ..."
        )
    if one.stages or one.changes:
        raise GenomeError("mixes with a schedule cannot be crossed", "cross their levels at one row, and append the result")
    if not 0.0 <= weight <= 1.0:
        raise GenomeError(f"a crossover cannot weigh {weight!r}", "use a number from 0 to 1")
    first, second = normalise(one).express, normalise(other).express
    scale = math.sqrt(sum(level > 0 for level in first.values()) / sum(level > 0 for level in second.values()))
    roots = {
        domain: (1.0 - weight) * math.sqrt(first.get(domain, 0.0)) + weight * scale * math.sqrt(second.get(domain, 0.0))
        for domain in sorted({*first, *second})
    }
    return normalise(replace(one, express={domain: root * root for domain, root in roots.items()}))


def mutate(epigenome: Epigenome, generator: np.random.Generator, strength: float) -> Epigenome:
    """Every level times exp(strength x a normal number), drawn in the order of the domains' names."""
    if not (math.isfinite(strength) and strength >= 0.0):
        raise GenomeError(f"a mutation cannot have strength {strength!r}", "use a number of at least 0")
    drawn = generator.standard_normal(len(epigenome.express))
    names = sorted(epigenome.express)
    factors = {name: math.exp(strength * value) for name, value in zip(names, drawn.tolist(), strict=True)}
    return _with(epigenome, {domain: level * factors[domain] for domain, level in epigenome.express.items()})


def appended(epigenome: Epigenome, row: int, levels: Mapping[str, float]) -> Epigenome:
    """The mix with these levels from row `row` on, by appending to its schedule: nothing before the row changes.

    The mix itself where it has these levels there already. At row 0 nothing was drawn yet, and the levels become those that
    it begins with. Raises GenomeError where changes were appended for later rows, and where nothing is left above 0.
    """
    now = levels_at(epigenome, row)
    changed = {domain: level for domain, level in levels.items() if now.get(domain, 0.0) != level}
    if not changed:
        return epigenome
    _with(replace(epigenome, express=now), changed)  # what is no mix is refused
    if row == 0:
        return replace(epigenome, express={**epigenome.express, **changed})
    if epigenome.changes and epigenome.changes[-1].row > row:
        raise GenomeError(
            f"row {row} is past: the mix was changed at row {epigenome.changes[-1].row}", "append to the end of a schedule"
        )
    changes = epigenome.changes
    if changes and changes[-1].row == row:
        changes, changed = changes[:-1], {**changes[-1].express, **changed}
    return replace(epigenome, changes=(*changes, Change(row, changed)))


def _level(epigenome: Epigenome, domain: str) -> float:
    if domain not in epigenome.express:
        raise GenomeError(f"the mix has no domain {domain!r}", f"its domains: {', '.join(sorted(epigenome.express))}")
    return epigenome.express[domain]


def _with(epigenome: Epigenome, levels: Mapping[str, float]) -> Epigenome:
    """`epigenome` with some levels changed. Raises GenomeError where none is left above 0, or one is no number any more."""
    express = {**epigenome.express, **levels}
    if not any(level > 0.0 for level in express.values()):
        raise GenomeError(f"the mix {express} expresses nothing: every level is 0", "leave one domain above 0")
    wrong = {domain: level for domain, level in express.items() if not (math.isfinite(level) and level >= 0.0)}
    if wrong:
        raise GenomeError(f"a level is a number of at least 0, not {wrong}", "use smaller factors")
    return replace(epigenome, express=express)
