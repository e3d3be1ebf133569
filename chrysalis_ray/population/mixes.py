"""Epigenomes: the data mix of each variant, as its YAML deals, draws or searches it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from chrysalis_ray.config.epigenome import DirichletMixes, Expression, ListedMixes, Mix, SimplexGridMixes, spread
from chrysalis_ray.config.epigenome_checks import loud, silenced, stage_step
from chrysalis_ray.config.experiment import Experiment
from chrysalis_ray.config.histories import heard_by_default
from chrysalis_ray.config.mix_parents import descents, expression_of, parent_names
from chrysalis_ray.config.population import Epigenomes, LevelMixes
from chrysalis_ray.core.records import Change, Epigenome, Variant, sha256_of
from chrysalis_ray.core.shares import parse_prior, schedule, unheard
from chrysalis_ray.genome.epigenome import brighten, crossover, dim, mutate, silence, swap
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
    """How many mixes there are to deal of the domains that are not silenced; None where each is drawn anew."""
    domains = loud(spec, domains)
    if spec.type == "listed":
        return len(spec.mixes)
    if spec.type == "brightened":
        return len(domains)
    if spec.type == "simplex_grid":
        return math.comb(spec.steps + len(domains) - 1, len(domains) - 1)
    return None


@dataclass(frozen=True)
class Budget:
    """The rows of a variant's whole training, those of one step, the tokens of a row, and the tokens that were asked for."""

    rows: int
    rows_per_step: int
    row_tokens: int
    tokens: int


def epigenome_of(
    spec: Epigenomes, number: int, domains: Sequence[str], rng_seed: int, values: Mapping[str, Any], budget: Budget
) -> tuple[Epigenome, str]:
    """The data mix `number`, and a short name for it. `values` holds the levels that were drawn (`level.<domain>`).

    Raises GenomeError where nothing is left to express.
    """
    epigenome, name = _levels_of(spec, number, loud(spec, domains), rng_seed, values)
    descent = descents(spec)[name] if spec.type == "listed" else None
    if descent is None:
        epigenome = replace(epigenome, express=dict.fromkeys(silenced(spec, domains), 0.0) | dict(epigenome.express))
    return _expressed(epigenome, *expression_of(spec, descent), domains, budget), name


def _expressed(epigenome: Epigenome, expression: Expression, prior: str, domains: Sequence[str], budget: Budget) -> Epigenome:
    """Levels with all that was said beside them, every domain by its name."""
    for domain in silenced(expression, domains):
        epigenome = silence(epigenome, domain) if domain in epigenome.express else epigenome
    heard = loud(expression, domains)
    again = expression.replay
    replay = again.express or dict.fromkeys(heard, 1.0) if again is not None else {}
    counted = expression.caps or expression.stages or parse_prior(prior)[0] == "unimax"
    return replace(
        epigenome,
        prior=prior,
        floors=spread(expression.floors, heard),
        caps=spread(expression.caps, heard),
        loss_weights=spread(expression.loss_weights, heard),
        replay_share=again.share if again is not None else 0.0,
        replay={domain: level for domain, level in replay.items() if domain in heard},
        kept=budget.tokens / expression.match.repetition if expression.match is not None else 1.0,
        budget_rows=budget.rows if counted else 0,
        row_tokens=budget.row_tokens if counted else 0,
        stages=tuple(_staged(expression, budget)),
    )


def counted_in_rows(
    epigenome: Epigenome, budget: Budget, tokens: Mapping[str, int], rows: Mapping[str, int], *, bred: bool
) -> Epigenome:
    """The mix with the rows that every domain holds, where its draws depend on them: it has floors or caps, counts epochs, is
    `bred` while it trains, or has a share that is too small for blocks. `tokens` and `rows` are those of the train split."""
    exact = replace(epigenome, rows=dict(sorted(rows.items())), budget_rows=budget.rows, row_tokens=budget.row_tokens)
    counted = epigenome.floors or epigenome.caps or parse_prior(epigenome.prior)[0] == "unimax"
    if counted or bred or any(segment.quotas for segment in schedule(exact, tokens)):
        return exact
    return epigenome


def never_drawn(variants: Sequence[Variant], tokens: Mapping[str, int]) -> Iterator[str]:
    """A sentence for every domain, and reason, that mixes ask for and that no row of their training is of."""
    whose: dict[tuple[str, str], list[str]] = {}
    for variant in variants:
        for domain, why in unheard(variant.epigenome, tokens).items() if tokens else ():
            whose.setdefault((domain, why), []).append(variant.variant_id)
    for (domain, why), names in whose.items():
        others = f" and {len(names) - 1} others" if len(names) > 1 else ""
        yield f"{names[0]}{others}: {domain!r} is never drawn: {why}"


def _staged(expression: Expression, budget: Budget) -> Iterator[Change]:
    """Stages begin with a step."""
    for stage in expression.stages:
        step = stage_step(stage, budget.rows // budget.rows_per_step, budget.rows_per_step * budget.row_tokens)
        yield Change(step * budget.rows_per_step, dict(stage.express))


def _levels_of(
    spec: Epigenomes, number: int, domains: Sequence[str], rng_seed: int, values: Mapping[str, Any]
) -> tuple[Epigenome, str]:
    if spec.type == "listed":
        mix = spec.mixes[number % len(spec.mixes)]
        return listed_levels(spec, rng_seed)[mix.name], mix.name
    if spec.type == "brightened":
        bright = domains[number % len(domains)]
        return brighten(Epigenome(dict.fromkeys(domains, 1.0)), bright, spec.level), bright
    if isinstance(spec, SimplexGridMixes):
        levels = _grid_point(spec, number, domains)
    elif isinstance(spec, LevelMixes):
        levels = {domain: float(values.get(f"{LEVEL}{domain}", 1.0)) for domain in domains}
    else:
        levels = _dirichlet(spec, number, domains, rng_seed)
    return Epigenome(express=levels), max(levels, key=lambda domain: levels[domain])


def listed_levels(spec: ListedMixes, rng_seed: int) -> dict[str, Epigenome]:
    """The levels that every listed mix begins with, by its name: its own, those of the mix it is like, or a cross of two, and
    what its operators make of them. A mutation is drawn from the experiment's `rng_seed` and the name of the mix: one for all
    its variants."""
    made: dict[str, Epigenome] = {}
    for mix in spec.mixes:
        parents = [made[name] for name in parent_names(mix)]
        made[mix.name] = _operated(_begun(mix, parents), mix, rng_seed)
    return made


def _begun(mix: Mix, parents: Sequence[Epigenome]) -> Epigenome:
    if len(parents) == 2:
        return crossover(parents[0], parents[1], 0.5 if mix.weight is None else mix.weight)
    return parents[0] if parents else Epigenome(express=dict(mix.express))


def _operated(epigenome: Epigenome, mix: Mix, rng_seed: int) -> Epigenome:
    for domain, factor in mix.brighten.items():
        epigenome = brighten(epigenome, domain, factor)
    for domain, factor in mix.dim.items():
        epigenome = dim(epigenome, domain, factor)
    for one, other in mix.swap:
        epigenome = swap(epigenome, one, other)
    if mix.mutate is None:
        return epigenome
    return mutate(epigenome, np.random.default_rng(int(sha256_of([rng_seed, "mutate", mix.name])[:16], 16)), mix.mutate)


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
