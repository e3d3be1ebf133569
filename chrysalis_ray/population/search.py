"""From YAML to unmodified Ray Tune schedulers and search algorithms."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from chrysalis_ray.config.population import Asha, Bohb, HyperBand, MedianStopping, Pb2, Pbt, Population
from chrysalis_ray.config.population_checks import search_ranges
from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.records import Epigenome, Variant
from chrysalis_ray.genome.epigenome import mutate, normalise
from chrysalis_ray.population.branch import ranges_of
from chrysalis_ray.population.words import LEVEL

# what a YAML may name -> (module it needs, extra of this package that brings it)
NEEDS = {"optuna": ("optuna", "optuna"), "pb2": ("sklearn", "pb2"), "bohb": ("hpbandster", "bohb")}


def check_installed(population: Population) -> None:
    """Raises RunError when the searcher or the scheduler needs a package that is not here."""
    for key, name in (("searcher", population.searcher.type), ("scheduler", population.scheduler.type)):
        module, extra = NEEDS.get(name, ("", ""))
        if module and find_spec(module) is None:
            raise RunError(
                f"population.{key} is {name}, which needs the package {module}, and it is not installed",
                f"pip install -c constraints.txt -e '.[{extra}]', or write another {key}",
            )


def make_scheduler(population: Population) -> Any:
    """The Tune scheduler that a population's YAML names. Time is counted in reports."""
    from ray.tune import schedulers

    spec = population.scheduler
    if isinstance(spec, Asha):
        return schedulers.ASHAScheduler(
            time_attr="report",
            max_t=population.reports,
            grace_period=min(spec.grace_reports, population.reports),
            reduction_factor=spec.reduction_factor,
            brackets=spec.brackets,
        )
    if isinstance(spec, HyperBand):
        return schedulers.HyperBandScheduler(
            time_attr="report", max_t=population.reports, reduction_factor=spec.reduction_factor
        )
    if isinstance(spec, Bohb):
        return schedulers.HyperBandForBOHB(time_attr="report", max_t=population.reports, reduction_factor=spec.reduction_factor)
    if isinstance(spec, Pbt):
        return schedulers.PopulationBasedTraining(
            time_attr="report",
            perturbation_interval=spec.perturb_every_reports,
            quantile_fraction=spec.quantile,
            resample_probability=spec.resample_probability,
            hyperparam_mutations=mutations(population),
            custom_explore_fn=partial(mutated_levels, strength=spec.level_strength)
            if spec.level_strength is not None
            else None,
            log_config=False,
        )
    if isinstance(spec, Pb2):
        from ray.tune.schedulers.pb2 import PB2

        return PB2(
            time_attr="report",
            perturbation_interval=spec.perturb_every_reports,
            quantile_fraction=spec.quantile,
            hyperparam_bounds=bounds(population),
            log_config=False,
        )
    if isinstance(spec, MedianStopping):
        return schedulers.MedianStoppingRule(
            time_attr="report", grace_period=spec.grace_reports, min_samples_required=spec.min_variants, hard_stop=True
        )
    return schedulers.FIFOScheduler()


def mutable_fields(population: Population, domains: Sequence[str]) -> tuple[str, ...]:
    """What the scheduler may change while a variant trains; these fields travel in Tune's config."""
    scheduler = population.scheduler
    if not isinstance(scheduler, (Pbt, Pb2)):
        return ()
    if _by_operator(population):
        ranged = [name for name in search_ranges(population.search) if name in scheduler.mutate]
        return (*ranged, *(f"{LEVEL}{domain}" for domain in sorted(domains)))
    named = scheduler.mutate
    return tuple(name for name in ranges_of(population) if name in named or (name.startswith(LEVEL) and "levels" in named))


def _by_operator(population: Population) -> bool:
    """Whether levels are perturbed by the epigenome's own operator, and not one by one from their ranges."""
    return isinstance(population.scheduler, Pbt) and population.scheduler.level_strength is not None


def mutated_levels(config: dict[str, Any], strength: float) -> dict[str, Any]:
    """A copy of Tune's config with its levels mutated and normalised, together, as one mix; PBT asks for it at every exploit.

    It draws from Python's own generator, as PBT does, which `run_population` seeds."""
    import numpy as np

    mix = Epigenome({name.removeprefix(LEVEL): float(level) for name, level in config.items() if name.startswith(LEVEL)})
    bred = normalise(mutate(mix, np.random.default_rng(random.getrandbits(64)), strength))
    return config | {f"{LEVEL}{domain}": level for domain, level in bred.express.items()}


def mutations(population: Population) -> dict[str, Any]:
    """How PBT resamples what it may mutate: from the search space."""
    from ray import tune

    space, result = ranges_of(population), {}
    for name in mutable_fields(population, ()):
        written = space[name]
        if written.type == "log_uniform":
            result[name] = tune.loguniform(written.low, written.high)
        elif written.type == "uniform":
            result[name] = tune.uniform(written.low, written.high)
        else:
            result[name] = list(written.values)
    return result


def bounds(population: Population) -> dict[str, Any]:
    """Between which ends PB2 proposes what it may mutate."""
    ranges = {name: ranges_of(population)[name] for name in mutable_fields(population, ())}
    return {name: [drawn.low, drawn.high] for name, drawn in ranges.items() if drawn.type in ("uniform", "log_uniform")}


def make_searcher(
    variants: Sequence[Variant], fixed: dict[str, Any], mutable: Sequence[str], slots: int
) -> tuple[Any, dict[str, Any]]:
    """Tune's own generator over exactly these variants in their order, and the matching parameter space."""
    from ray import tune
    from ray.tune.search.basic_variant import BasicVariantGenerator

    points = [{"variant": variant.variant_id, **{name: value_of(variant, name) for name in mutable}} for variant in variants]
    space = {**fixed, "variant": tune.choice([variant.variant_id for variant in variants])}
    for name in mutable:
        space[name] = tune.choice(sorted({point[name] for point in points}))
    return BasicVariantGenerator(points_to_evaluate=points, max_concurrent=slots, random_state=0), space


def value_of(variant: Variant, name: str) -> Any:
    """What a variant starts with for a name of the search space."""
    if name.startswith(LEVEL):
        return variant.epigenome.express.get(name.removeprefix(LEVEL), 0.0)
    return getattr(variant.hyperparameters, name)
