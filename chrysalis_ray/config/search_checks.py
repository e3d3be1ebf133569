"""Whether mixes, search space and searcher of a population fit together, and with the domains of the genome."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from chrysalis_ray.config.epigenome_checks import loud
from chrysalis_ray.config.population import Choice, DirichletMixes, Grid, LevelMixes, ListedMixes, Population, SimplexGridMixes
from chrysalis_ray.config.population_checks import bad_number, search_ranges
from chrysalis_ray.config.problems import Finding, Location, suggestion
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.core.shares import MOST_LEVEL

SOBOL_AXES = 40  # as many as population/sobol.py has direction numbers for
LEVELS = (0.0, True, MOST_LEVEL)
MOST_CHOICES = 512  # mixes that a searcher may be asked to tell apart


def check_search(loaded: LoadedExperiment, domains: Sequence[str]) -> Iterator[Finding]:
    """Every problem of epigenomes and searcher, as (path in the experiment, what is wrong and meant)."""
    population = loaded.experiment.population
    yield from _mixes(population, domains)
    yield from _grid(population, domains)
    if population.searcher.type == "sobol":
        yield from _sobol(population)
    elif population.proposes:
        yield from _proposing(loaded, domains)
    if population.scheduler.type == "bohb" and population.searcher.type != "bohb":
        yield (
            ("population", "scheduler", "type"),
            "bohb pauses variants until its searcher has filled a bracket; write searcher: {type: bohb}, "
            "or scheduler type: asha",
        )


def _mixes(population: Population, domains: Sequence[str]) -> Iterator[Finding]:
    epigenomes = population.epigenomes
    at: Location = ("population", "epigenomes")
    named: list[tuple[Location, str]] = []
    if isinstance(epigenomes, ListedMixes):
        named = [
            ((*at, "mixes", position, "express", domain), domain)
            for position, mix in enumerate(epigenomes.mixes)
            for domain in mix.express
        ]
    elif isinstance(epigenomes, DirichletMixes):
        named = [((*at, "concentrations", domain), domain) for domain in epigenomes.concentrations]
    elif isinstance(epigenomes, LevelMixes):
        named = [((*at, "levels", domain), domain) for domain in epigenomes.levels]
        yield from _levels(epigenomes, domains)
    for path, domain in named:
        if domain not in domains:
            yield path, f"no source provides the domain {domain!r}; {suggestion(domain, domains)}"


def _levels(epigenomes: LevelMixes, domains: Sequence[str]) -> Iterator[Finding]:
    at: Location = ("population", "epigenomes", "levels")
    for domain, drawn in epigenomes.levels.items():
        path = (*at, domain)
        if isinstance(drawn, (Choice, Grid)):
            for position, value in enumerate(drawn.values):
                if what := bad_number("a level", value, LEVELS):
                    yield (*path, "values", position), what
            if isinstance(drawn, Grid) and len(set(map(repr, drawn.values))) < len(drawn.values):
                yield (*path, "values"), "a grid holds a value twice"
            continue
        for end in ("low", "high"):
            if what := bad_number("a level", getattr(drawn, end), LEVELS):
                yield (*path, end), what
    heard = loud(epigenomes, domains)
    silent = [d for d in heard if d in epigenomes.levels and _may_be_zero(epigenomes.levels[d])]
    if heard and silent == heard:
        yield at, "every domain may be drawn at level 0 at once: that mix expresses nothing; raise the least level of one"


def _may_be_zero(drawn: object) -> bool:
    return isinstance(drawn, (Choice, Grid)) and 0 in drawn.values


def _grid(population: Population, domains: Sequence[str]) -> Iterator[Finding]:
    """Whether there is a variant for every point of the crossed grids."""
    epigenomes, searched = population.epigenomes, population.proposes
    grids = {name: len(drawn.values) for name, drawn in search_ranges(population.search).items() if isinstance(drawn, Grid)}
    if isinstance(epigenomes, LevelMixes):
        grids |= {f"level of {d}": len(drawn.values) for d, drawn in epigenomes.levels.items() if isinstance(drawn, Grid)}
    if isinstance(epigenomes, SimplexGridMixes):
        domains = loud(epigenomes, domains) or domains
        mixes = math.comb(epigenomes.steps + len(domains) - 1, len(domains) - 1)
        shape = f"{epigenomes.steps} steps over {len(domains)} domains are {mixes} mixes"
        if searched and mixes > MOST_CHOICES:
            yield (
                ("population", "epigenomes", "steps"),
                f"{shape}, too many to choose between ({MOST_CHOICES}); write fewer steps, or type: levels",
            )
        if not searched and math.prod(grids.values()) * mixes > population.variants:
            other = f" for each of {math.prod(grids.values())} points of the grid" if grids else ""
            yield (
                ("population", "epigenomes", "steps"),
                f"{shape}{other}, and there are {population.variants} variants; write fewer steps, "
                f"variants: {math.prod(grids.values()) * mixes}, or type: dirichlet",
            )
            return
    product = math.prod(grids.values())
    if product > population.variants and not searched:
        shown = " x ".join(f"{name} {count}" for name, count in grids.items())
        yield (
            ("population", "variants"),
            f"{population.variants} variants cannot hold the grid of {product} points ({shown}); "
            f"write variants: {product}, or type: choice",
        )


def _sobol(population: Population) -> Iterator[Finding]:
    axes = [name for name, drawn in search_ranges(population.search).items() if not isinstance(drawn, Grid)]
    if isinstance(population.epigenomes, LevelMixes):
        axes += [domain for domain, drawn in population.epigenomes.levels.items() if not isinstance(drawn, Grid)]
    at: Location = ("population", "searcher", "type")
    if not axes:
        yield at, "sobol places variants in ranges, and there is none that is drawn; write type: branch, or add a range"
    elif len(axes) > SOBOL_AXES:
        yield at, f"{len(axes)} ranges; Sobol points are known for {SOBOL_AXES}: write type: branch, or fewer ranges"


def _proposing(loaded: LoadedExperiment, domains: Sequence[str]) -> Iterator[Finding]:
    population = loaded.experiment.population
    name = population.searcher.type
    at: Location = ("population", "searcher")
    ranges = search_ranges(population.search)
    for field, drawn in ranges.items():
        if isinstance(drawn, Grid):
            yield ("population", "search", field, "type"), f"{name} proposes values, a grid is dealt; write type: choice"
    epigenomes = population.epigenomes
    if isinstance(epigenomes, DirichletMixes):
        yield (
            ("population", "epigenomes", "type"),
            f"a dirichlet mix is drawn at random, {name} could not learn from it; write type: levels or type: simplex_grid",
        )
    if isinstance(epigenomes, LevelMixes):
        for domain, drawn in epigenomes.levels.items():
            if isinstance(drawn, Grid):
                path = ("population", "epigenomes", "levels", domain, "type")
                yield path, f"{name} proposes values, a grid is dealt; write type: choice"
    one_mix = isinstance(epigenomes, ListedMixes) and len(epigenomes.mixes) == 1
    if not ranges and (one_mix or len(domains) == 1):
        yield (*at, "type"), "there is nothing to search: no range and only one mix; add a range to population.search"
    scheduler = population.scheduler.type
    if name == "optuna" and scheduler in ("pbt", "pb2", "hyperband"):
        yield (
            ("population", "scheduler", "type"),
            f"{scheduler} wants all variants at once, optuna proposes one when another has ended; "
            "write scheduler type: asha, median or fifo, or searcher type: sobol",
        )
    if name == "bohb" and scheduler != "bohb":
        yield (
            ("population", "scheduler", "type"),
            f"{scheduler} does not tell bohb how long a variant trained for its loss; write scheduler type: bohb",
        )
    slots, bodies = 1 if loaded.body.slots == "auto" else loaded.places, loaded.body.count or 1
    if slots >= population.variants:
        yield (
            ("population", "variants"),
            f"{population.variants} variants in {slots} slots: all would be proposed before the first one has ended; "
            f"write body: {{slots: {max(population.variants // (4 * bodies), 1)}}}, or searcher type: sobol",
        )
