"""Epigenomes: the data mix of each variant, as its YAML deals, draws or searches it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from chrysalis_ray.config.experiment import Experiment
from chrysalis_ray.config.histories import heard_by_default
from chrysalis_ray.config.population import DirichletMixes, Epigenomes, LevelMixes, SimplexGridMixes
from chrysalis_ray.core.records import Epigenome, sha256_of
from chrysalis_ray.population.words import LEVEL


def heard_domains(
    experiment: Experiment, domains: tuple[str, ...], parameters: int, tell: Callable[[str, str], None]
) -> tuple[str, ...]:
    """The domains that mixes are made of for a base of so many parameters; why some are left out is told."""
    heard, why = heard_by_default(experiment, domains, parameters)
    if why is not None:
        tell("mixes", why)
    return heard


def mix_count(spec: Epigenomes, domains: Sequence[str]) -> int | None:
    """How many mixes there are to deal; None where each is drawn anew."""
    if spec.type == "listed":
        return len(spec.mixes)
    if spec.type == "brightened":
        return len(domains)
    if spec.type == "simplex_grid":
        return math.comb(spec.steps + len(domains) - 1, len(domains) - 1)
    return None


def epigenome_of(
    spec: Epigenomes, number: int, domains: Sequence[str], rng_seed: int, values: Mapping[str, Any]
) -> tuple[Epigenome, str]:
    """The data mix `number`, and a short name for it. `values` holds the levels that were drawn (`level.<domain>`)."""
    if spec.type == "listed":
        mix = spec.mixes[number % len(spec.mixes)]
        return Epigenome(express=dict(mix.express), prior=spec.prior), mix.name
    if spec.type == "brightened":
        bright = domains[number % len(domains)]
        levels = {domain: spec.level if domain == bright else 1.0 for domain in domains}
        return Epigenome(express=levels, prior=spec.prior), bright
    if isinstance(spec, SimplexGridMixes):
        levels = _grid_point(spec, number, domains)
    elif isinstance(spec, LevelMixes):
        levels = {domain: float(values.get(f"{LEVEL}{domain}", 1.0)) for domain in domains}
    else:
        levels = _dirichlet(spec, number, domains, rng_seed)
    return Epigenome(express=levels, prior=spec.prior), max(levels, key=lambda domain: levels[domain])


def _dirichlet(spec: DirichletMixes, number: int, domains: Sequence[str], rng_seed: int) -> dict[str, float]:
    generator = random.Random(sha256_of([rng_seed, "mix", number]))
    raw = [generator.gammavariate(spec.concentrations.get(domain, spec.concentration), 1.0) for domain in domains]
    total = sum(raw)
    return {domain: round(value / total, 6) for domain, value in zip(domains, raw, strict=True)}


def _grid_point(spec: SimplexGridMixes, number: int, domains: Sequence[str]) -> dict[str, float]:
    count = mix_count(spec, domains)
    assert count is not None
    parts = next(islice(compositions(spec.steps, len(domains)), number % count, None))
    return {domain: part / spec.steps for domain, part in zip(domains, parts, strict=True)}


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `total` as an ordered sum of `parts` numbers of at least 0, the first part largest first."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)
