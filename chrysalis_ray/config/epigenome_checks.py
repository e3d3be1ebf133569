"""Whether what is said of mixes beside their levels fits the domains, the budget and the scheduler."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from chrysalis_ray.config.epigenome import OTHERS, Expression, ListedMixes, Mix, Stage, expression_of, spread
from chrysalis_ray.config.population import LevelMixes, Pb2, Pbt
from chrysalis_ray.config.population_checks import common_rows, step_sizes
from chrysalis_ray.config.problems import Finding, Location, suggestion
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.core.shares import BLOCK

EPIGENOMES: Location = ("population", "epigenomes")


def check_epigenomes(loaded: LoadedExperiment, domains: Sequence[str]) -> Iterator[Finding]:
    """Every problem of silence, floors, caps, replay, loss weights, stages and match, as (path, what is wrong and meant)."""
    epigenomes = loaded.experiment.population.epigenomes
    if isinstance(epigenomes, LevelMixes):
        for domain in silenced(epigenomes, list(epigenomes.levels)):
            yield (*EPIGENOMES, "levels", domain), f"{domain!r} is silenced; leave it out here, or out of silence"
    written: list[tuple[Location, Expression]] = [(EPIGENOMES, epigenomes)]
    mixes: Sequence[Mix | None] = [None]
    if isinstance(epigenomes, ListedMixes):
        mixes = epigenomes.mixes
        written += [((*EPIGENOMES, "mixes", place), mix) for place, mix in enumerate(epigenomes.mixes)]
    for at, expression in written:
        yield from _names(expression, at, domains)
        yield from _stages(loaded, expression, at)
        yield from _match(loaded, expression, at)
    seen: set[Finding] = set()  # what all mixes share is wrong once
    for place, mix in enumerate(mixes):
        here = (*EPIGENOMES, "mixes", place) if mix is not None else EPIGENOMES
        expression, _ = expression_of(epigenomes, mix)
        for finding in _together(expression, mix, domains, here):
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


def _together(expression: Expression, mix: Mix | None, domains: Sequence[str], here: Location) -> Iterator[Finding]:
    """Problems between the keys that hold for one mix; told where the mix wrote them, or where all of them are."""

    def at(key: str) -> Location:
        return (*(here if mix is not None and key in mix.model_fields_set else EPIGENOMES), key)

    quiet = silenced(expression, domains)
    heard = loud(expression, domains)
    if not heard:
        yield at("silence"), "silences every domain of the genome; leave one"
        return
    if mix is not None and not any(level > 0.0 for domain, level in mix.express.items() if domain not in quiet):
        yield at("silence"), f"silences all that {mix.name!r} expresses; leave one of {', '.join(mix.express)}"
    for key in ("floors", "caps", "loss_weights"):
        for domain in getattr(expression, key):
            if domain in quiet:
                yield (*at(key), domain), f"{domain!r} is silenced; leave it out here, or out of silence"
    levels: dict[str, float] = dict(mix.express) if mix is not None else dict.fromkeys(heard, 1.0)
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
