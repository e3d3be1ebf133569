"""From YAML to unmodified Ray Tune schedulers and search algorithms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chrysalis_ray.config.experiment import Asha, MedianStopping, Pbt, Population
from chrysalis_ray.core.records import Variant

METRIC, MODE = "select_loss", "min"
DIVERGED = 1e9  # nats; what schedulers hear of a loss that is no number: worse than any, and safe to average


def make_scheduler(population: Population) -> Any:
    """The Tune scheduler that a population's YAML names. Time is counted in reports."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, PopulationBasedTraining

    spec = population.scheduler
    if isinstance(spec, Asha):
        return ASHAScheduler(
            time_attr="report",
            max_t=population.reports,
            grace_period=min(spec.grace_reports, population.reports),
            reduction_factor=spec.reduction_factor,
            brackets=spec.brackets,
        )
    if isinstance(spec, Pbt):
        return PopulationBasedTraining(
            time_attr="report",
            perturbation_interval=spec.perturb_every_reports,
            quantile_fraction=spec.quantile,
            resample_probability=spec.resample_probability,
            hyperparam_mutations=mutations(population),
            log_config=False,
        )
    if isinstance(spec, MedianStopping):
        return MedianStoppingRule(
            time_attr="report", grace_period=spec.grace_reports, min_samples_required=spec.min_variants, hard_stop=True
        )
    return FIFOScheduler()


def mutations(population: Population) -> dict[str, Any]:
    """How PBT resamples what it may mutate: from the search space where there is one, else around the field's usual range."""
    from ray import tune

    usual = {"learning_rate": (1e-5, 1e-2), "weight_decay": (1e-4, 1e-1), "clip": (0.1, 10.0)}
    spec = population.scheduler
    assert isinstance(spec, Pbt)
    result: dict[str, Any] = {}
    for name in spec.mutate:
        written = getattr(population.search, name)
        if written is None:
            result[name] = tune.loguniform(*usual[name])
        elif written.type == "log_uniform":
            result[name] = tune.loguniform(written.low, written.high)
        elif written.type == "uniform":
            result[name] = tune.uniform(written.low, written.high)
        else:
            result[name] = list(written.values)
    return result


def mutable_fields(population: Population) -> tuple[str, ...]:
    """What the scheduler may change while a variant trains; these fields travel in Tune's config."""
    return tuple(population.scheduler.mutate) if isinstance(population.scheduler, Pbt) else ()


def make_searcher(
    variants: Sequence[Variant], fixed: dict[str, Any], mutable: Sequence[str], slots: int
) -> tuple[Any, dict[str, Any]]:
    """Tune's own generator over exactly these variants in their order, and the matching parameter space."""
    from ray import tune
    from ray.tune.search.basic_variant import BasicVariantGenerator

    points = [
        {"variant": variant.variant_id, **{name: getattr(variant.hyperparameters, name) for name in mutable}}
        for variant in variants
    ]
    space = {**fixed, "variant": tune.choice([variant.variant_id for variant in variants])}
    for name in mutable:
        space[name] = tune.choice(sorted({point[name] for point in points}))
    return BasicVariantGenerator(points_to_evaluate=points, max_concurrent=slots, random_state=0), space
