"""The blueprints that a probe decides between: each with the experiment around it, checked as if it stood there alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from chrysalis_ray.config.blueprint import Blueprint
from chrysalis_ray.config.blueprint_probe import TENTH, BlueprintProbe
from chrysalis_ray.config.population_checks import check_population
from chrysalis_ray.config.problems import problem_at
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.config.yaml_tree import Node
from chrysalis_ray.core.errors import ConfigError

Load = Callable[[Path, Sequence[str]], LoadedExperiment]
_ALTERNATIVES = ("learning_rates", "ranks")
MOST_RANK = 1024


def with_candidates(loaded: LoadedExperiment, root: Node, load: Load) -> tuple[LoadedExperiment, list[str]]:
    """`loaded` with the candidates of its probe, itself the first, and what is wrong with them.

    No candidates where there is no probe, and where a run has decided. `load` reads the same experiment with other overrides.
    """
    probe = loaded.experiment.probe
    if probe is None or (loaded.chosen is not None and loaded.chosen.probed):
        return loaded, []
    own = replace(loaded, experiment=loaded.experiment.model_copy(update={"probe": None}))
    problems = list(_contradictions(probe, loaded, root))
    if probe.candidates:
        others = [] if problems else list(_written(loaded, root, probe, load, problems))
    else:
        others = list(_alternatives(own, probe))
        if not others and not problems:
            problems.append(
                problem_at(root, ("probe",), "leaves the blueprint alone: there is nothing to decide; add candidates")
            )
    candidates = ((loaded.experiment.blueprint, own), *others)
    problems += _too_short(probe, candidates, root)
    return replace(loaded, candidates=candidates), problems


def probe_tokens(loaded: LoadedExperiment) -> int:
    """Tokens that each candidate of a probe trains, before they are rounded to whole steps."""
    probe = loaded.experiment.probe
    assert probe is not None
    return probe.tokens or max(loaded.experiment.population.tokens_per_variant // TENTH, 1)


def _contradictions(probe: BlueprintProbe, loaded: LoadedExperiment, root: Node) -> Iterator[str]:
    named = loaded.experiment.blueprint
    if named in probe.candidates:
        at = ("probe", "candidates", probe.candidates.index(named))
        yield problem_at(root, at, f"{named!r} is the experiment's own blueprint, which is a candidate anyway; leave it out")
    for key in _ALTERNATIVES:
        if probe.candidates and key in probe.model_fields_set:
            yield problem_at(root, ("probe", key), "makes alternatives where no candidates are written; leave one of them out")


def _written(
    loaded: LoadedExperiment, root: Node, probe: BlueprintProbe, load: Load, problems: list[str]
) -> Iterator[tuple[str, LoadedExperiment]]:
    tokens = f"population.tokens_per_variant={loaded.experiment.population.tokens_per_variant}"  # auto has a number by now
    for place, name in enumerate(probe.candidates):
        try:
            yield name, load(loaded.path, [*loaded.overrides, "probe=", tokens, f"blueprint={json.dumps(name)}"])
        except ConfigError as error:
            first, *more = error.problems or (str(error),)
            told = f"{name!r} is no candidate: {first}" + (f" (and {len(more)} more)" if more else "")
            problems.append(problem_at(root, ("probe", "candidates", place), told))


def _alternatives(own: LoadedExperiment, probe: BlueprintProbe) -> Iterator[tuple[str, LoadedExperiment]]:
    """Every learning rate with every rank, but for those it has and those that its base, or its kind, has no room for."""
    blueprint = own.blueprint
    made = {(blueprint.optimizer.learning_rate, blueprint.rank)}
    for factor in probe.learning_rates:
        for wider in probe.ranks:
            rate = (
                float(f"{blueprint.optimizer.learning_rate * factor:.3g}") if factor != 1 else blueprint.optimizer.learning_rate
            )
            rank = max(round(min(blueprint.rank * wider, MOST_RANK + 1)), 1)
            if (rate, rank) in made or rank > MOST_RANK or not 0 < rate < math.inf:
                continue
            made.add((rate, rank))
            changed = _with(blueprint, rate, rank)
            other = replace(own, blueprint=changed or blueprint)
            if changed is not None and not any(check_population(other)):
                named = [f"learning rate {rate:g}"] if factor != 1 else []
                yield " and ".join([*named, f"rank {rank}"] if rank != blueprint.rank else named), other


def _with(blueprint: Blueprint, learning_rate: float, rank: int) -> Blueprint | None:
    """The blueprint with another rate and rank of what it trains; None for a kind that has no rank, or not this one."""
    changes: dict[str, object] = {"optimizer": blueprint.optimizer.model_copy(update={"learning_rate": learning_rate})}
    if blueprint.adapter is None:
        changes["lora"] = blueprint.lora.model_copy(update={"rank": rank})
    elif rank != blueprint.rank:
        try:
            changes["adapter"] = type(blueprint.adapter).model_validate(blueprint.adapter.model_dump() | {"rank": rank})
        except ValidationError:
            return None
    return blueprint.model_copy(update=changes)


def _too_short(probe: BlueprintProbe, candidates: Sequence[tuple[str, LoadedExperiment]], root: Node) -> Iterator[str]:
    """Candidates of which the probe's tokens are not even a step."""
    for name, candidate in candidates:
        lanes = candidate.blueprint.lanes
        step = lanes.rows_per_step * lanes.sequence_length
        tokens = probe.tokens or candidate.experiment.population.tokens_per_variant // TENTH
        if tokens < step:
            what = f"{tokens} tokens are less than one step of {name}; write at least {step}, better a hundred steps"
            yield problem_at(root, ("probe", "tokens"), what)
            return
