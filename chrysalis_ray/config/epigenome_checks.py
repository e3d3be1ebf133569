"""Whether what is said of mixes beside their levels fits the domains, the budget and the scheduler."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from chrysalis_ray.config.epigenome import OTHERS, Expression, ListedMixes, Mix, Mixes, Stage, spread
from chrysalis_ray.config.mix_parents import Descent, descents, expression_of, parent_names
from chrysalis_ray.config.population import LevelMixes, Pb2, Pbt
from chrysalis_ray.config.population_checks import common_rows, step_sizes
from chrysalis_ray.config.problems import Finding, Location, suggestion
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.core.shares import BLOCK

EPIGENOMES: Location = ("population", "epigenomes")


def check_epigenomes(loaded: LoadedExperiment, domains: Sequence[str]) -> Iterator[Finding]:
    """Every problem of silence, floors, caps, replay, loss weights, stages, match, and of mixes made of others, as (path, what
    is wrong and meant)."""
    epigenomes = loaded.experiment.population.epigenomes
    if isinstance(epigenomes, LevelMixes):
        for domain in silenced(epigenomes, list(epigenomes.levels)):
            yield (*EPIGENOMES, "levels", domain), f"{domain!r} is silenced; leave it out here, or out of silence"
    written: list[tuple[Location, Expression]] = [(EPIGENOMES, epigenomes)]
    mixes: Sequence[Mix | None] = [None]
    known: dict[str, Descent] = {}
    if isinstance(epigenomes, ListedMixes):
        mixes = epigenomes.mixes
        if lost := [*_parents(epigenomes)]:  # the rest cannot be told of a mix whose parents are not there
            yield from lost
            return
        known = descents(epigenomes)
        for place, of in enumerate(epigenomes.mixes):
            yield from _operators(epigenomes, of, (*EPIGENOMES, "mixes", place), known[of.name])
        written += [((*EPIGENOMES, "mixes", place), mix) for place, mix in enumerate(epigenomes.mixes)]
    for at, expression in written:
        yield from _names(expression, at, domains)
        yield from _stages(loaded, expression, at)
        yield from _match(loaded, expression, at)
    seen: set[Finding] = set()  # what all mixes share is wrong once
    for mix in mixes:
        for finding in _together(epigenomes, mix, known[mix.name] if mix is not None else None, domains):
            if finding not in seen:
                seen.add(finding)
                yield finding


def silenced(expression: Expression, domains: Sequence[str]) -> list[str]:
    """The domains that `silence` names, by pattern."""
    return [domain for domain in domains if any(fnmatchcase(domain, pattern) for pattern in expression.silence)]


def loud(expression: Expression, domains: Sequence[str]) -> list[str]:
    """The domains that it does not name: mixes that are dealt or drawn are made of these."""
    quiet = silenced(expression, domains)
    return [domain for domain in domains if domain not in quiet]


def _names(expression: Expression, at: Location, domains: Sequence[str]) -> Iterator[Finding]:
    for place, pattern in enumerate(expression.silence):
        if not any(fnmatchcase(domain, pattern) for domain in domains):
            yield (*at, "silence", place), f"no domain is named {pattern!r}; {suggestion(pattern, domains)}"
    for domain, least in expression.floors.items():
        if least * BLOCK < 1.0:
            what = f"{least:g} is less than one row in {BLOCK}; write 0.00025 or more"
            yield (*at, "floors", domain), what
    named: dict[Location, Mapping[str, float]] = {
        (*at, key): getattr(expression, key) for key in ("floors", "caps", "loss_weights")
    }
    if expression.replay is not None:
        named[(*at, "replay", "express")] = expression.replay.express or {}
    named |= {(*at, "stages", place, "express"): stage.express for place, stage in enumerate(expression.stages)}
    for path, levels in named.items():
        for domain in levels:
            if domain not in domains and not (domain == OTHERS and path[-1] != "express"):
                yield (*path, domain), f"no source provides the domain {domain!r}; {suggestion(domain, domains)}"


def _stages(loaded: LoadedExperiment, expression: Expression, at: Location) -> Iterator[Finding]:
    population = loaded.experiment.population
    rows = common_rows(step_sizes(population.search, loaded.blueprint.lanes))
    step_tokens = rows * loaded.blueprint.lanes.sequence_length
    steps = population.tokens_per_variant // step_tokens
    if population.reports <= steps:  # reports are equally long: steps that do not divide are not trained
        steps -= steps % population.reports
    before = 0
    for place, stage in enumerate(expression.stages):
        path = (*at, "stages", place, "at" if stage.at is not None else "at_tokens")
        step = stage_step(stage, steps, step_tokens)
        if step >= steps:
            yield path, f"begins with step {step} of {steps} (the first is 0): no step would have these levels; write less"
        elif step <= before:
            yield path, f"begins with step {step} of {steps}, not after the one before ({before}); write stages in order, apart"
        before = max(before, step)
    searched = isinstance(population.epigenomes, LevelMixes) and population.epigenomes.levels
    scheduler = population.scheduler
    if not isinstance(scheduler, (Pbt, Pb2)) or "levels" not in scheduler.mutate:
        return
    for place, stage in enumerate(expression.stages):
        for domain in stage.express:
            if getattr(scheduler, "level_strength", None) is not None or (searched and domain in searched):
                what = f"{scheduler.type} changes the level of {domain!r} as well; name another, or mutate no levels"
                yield (*at, "stages", place, "express", domain), what


def stage_step(stage: Stage, steps: int, step_tokens: int) -> int:
    """The step with which a stage begins: the first after its share of `steps`, or after so many tokens, or with them."""
    if stage.at_tokens is not None:
        return -(-stage.at_tokens // step_tokens)
    return math.ceil((stage.at or 0.0) * steps - 1e-9)


def _match(loaded: LoadedExperiment, expression: Expression, at: Location) -> Iterator[Finding]:
    tokens = loaded.experiment.population.tokens_per_variant
    if expression.match is not None and expression.match.repetition < tokens:
        yield (
            (*at, "match", "repetition"),
            f"a run of {expression.match.repetition} tokens is shorter than a variant ({tokens}); "
            f"write the tokens of the large run, {tokens} or more",
        )


def _parents(epigenomes: ListedMixes) -> Iterator[Finding]:
    """Mixes made of others that are not there, or not above, or that nothing can be made of."""
    names = [mix.name for mix in epigenomes.mixes]
    for place, mix in enumerate(epigenomes.mixes):
        at: Location = (*EPIGENOMES, "mixes", place, "cross" if mix.cross else "like")
        for parent in parent_names(mix):
            if parent in names[place:]:
                below = "is made of itself" if parent == mix.name else f"stands above {parent!r}, which it is made of"
                yield at, f"{mix.name!r} {below}; a mix is made of mixes above it"
            elif parent not in names:
                yield at, f"no mix is named {parent!r}; {suggestion(parent, names[:place] or ['(none above)'])}"
        if mix.cross and mix.cross[0] == mix.cross[1]:
            yield at, f"crosses {mix.cross[0]!r} with itself; write like: {mix.cross[0]}"


def _operators(epigenomes: ListedMixes, mix: Mix, at: Location, descent: Descent) -> Iterator[Finding]:
    """Operators on domains that a mix does not express, and parents that do not agree."""
    given = descent.given
    quiet = silenced(expression_of(epigenomes, descent)[0], list(given))
    named: list[tuple[Location, str, bool]] = [((*at, "brighten", domain), domain, True) for domain in mix.brighten]
    named += [((*at, "dim", domain), domain, True) for domain in mix.dim]
    named += [((*at, "swap", place), domain, False) for place, pair in enumerate(mix.swap) for domain in pair]
    for path, domain, times in named:
        if domain not in given:
            yield path, f"{mix.name!r} expresses no {domain!r}; {suggestion(domain, list(given))}"
        elif domain in quiet:
            yield path, f"{domain!r} is silenced; leave it out here, or out of silence"
        elif times and not given[domain]:
            yield path, f"{domain!r} stands at level 0, and stays there however many times; write its level in express"
    for place, (one, other) in enumerate(mix.swap):
        if one == other:
            yield (*at, "swap", place), f"swaps {one!r} with itself; write two domains"
    for key in descent.disputed:
        one, other = parent_names(mix)
        remedy = "cross mixes of one prior" if key == "prior" else f"write the {key} of {mix.name!r}"
        yield (*at, "cross"), f"{one!r} and {other!r} differ in `{key}`; {remedy}"


def _together(epigenomes: Mixes, mix: Mix | None, descent: Descent | None, domains: Sequence[str]) -> Iterator[Finding]:
    """Problems between the keys that hold for one mix; told where the mix, or who it has them from, wrote them, or where all
    of them are."""
    expression, _ = expression_of(epigenomes, descent)
    places = [other.name for other in epigenomes.mixes] if isinstance(epigenomes, ListedMixes) else []

    def at(key: str) -> Location:
        if descent is None or key not in descent.speakers:
            return (*EPIGENOMES, key)
        return (*EPIGENOMES, "mixes", places.index(descent.speakers[key].name), key)

    quiet = silenced(expression, domains)
    heard = loud(expression, domains)
    if not heard:
        yield at("silence"), "silences every domain of the genome; leave one"
        return
    levels: dict[str, float] = dict.fromkeys(heard, 1.0)
    if mix is not None and descent is not None:
        levels = {domain: float(audible) for domain, audible in descent.heard.items()}
        if not any(level > 0.0 for domain, level in levels.items() if domain not in quiet):
            yield at("silence"), f"silences all that {mix.name!r} expresses; leave one of {', '.join(levels)}"
    for key in ("floors", "caps", "loss_weights"):
        for domain in getattr(expression, key):
            if domain in quiet:
                yield (*at(key), domain), f"{domain!r} is silenced; leave it out here, or out of silence"
    for place, stage in enumerate(expression.stages):
        levels |= stage.express
        if not any(level > 0.0 for domain, level in levels.items() if domain not in quiet):
            yield (*at("stages"), place, "express"), "leaves every level at 0: nothing is expressed from there on; raise one"
        for domain in stage.express:
            if domain in quiet:
                yield (*at("stages"), place, "express", domain), f"{domain!r} is silenced; leave it out here, or out of silence"
    replayed = expression.replay.express if expression.replay is not None else None
    if replayed is not None and not any(level > 0.0 for domain, level in replayed.items() if domain not in quiet):
        yield (*at("replay"), "express"), "replays only domains that are silenced; name another, or leave it out of silence"
    floors = spread(expression.floors, heard)
    if (total := math.fsum(floors.values())) > 1.0:
        yield at("floors"), f"sum to {total:g} over {', '.join(floors)}; shares sum to 1, so write smaller ones"
