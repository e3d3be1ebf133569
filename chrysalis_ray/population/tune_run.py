"""The tune run: unmodified Ray Tune steers variants that live in one packed body."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chrysalis_ray.config.experiment import Population
from chrysalis_ray.core.records import Variant
from chrysalis_ray.population.listener import PopulationListener
from chrysalis_ray.population.search import METRIC, MODE, make_scheduler, make_searcher, mutable_fields

TRIAL_MEMORY = 256 * 1024 * 1024  # bytes a trial process reserves; it takes no CPU from the body


def run_population(
    population: Population,
    variants: Sequence[Variant],
    variants_folder: Path,
    omega: Any,
    omega_name: str,
    namespace: str,
    slots: int,
    folder: Path,
    listener: PopulationListener,
    rng_seed: int,
) -> None:
    """Run every variant to its end, its eviction or its scheduler's decision. Returns when Tune has nothing left to do.

    What came of it is omega's to tell (`summary`): Tune's own files are a transport and are thrown away.
    """
    from ray import tune
    from ray.tune.execution.placement_groups import PlacementGroupFactory

    from chrysalis_ray.population.trial import VariantTrial

    random.seed(rng_seed)  # PBT draws from the global generators of this process
    _seed_numpy(rng_seed)
    fixed = {"omega": omega_name, "namespace": namespace, "variants": str(variants_folder)}
    mutable = mutable_fields(population)
    searcher, space = make_searcher(variants, fixed, mutable, slots)
    light = PlacementGroupFactory([{"memory": TRIAL_MEMORY}])
    tune.Tuner(
        tune.with_resources(VariantTrial, light),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode=MODE,
            search_alg=searcher,
            scheduler=make_scheduler(population),
            num_samples=len(variants),
            trial_dirname_creator=lambda trial: f"{trial.config['variant']}_{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="population",
            storage_path=str(folder),
            verbose=0,
            callbacks=[listener],
            failure_config=tune.FailureConfig(max_failures=population.max_failures),
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_frequency=1 if mutable else 0, num_to_keep=4 if mutable else None
            ),
        ),
    ).fit()


def _seed_numpy(rng_seed: int) -> None:
    import numpy

    numpy.random.seed(rng_seed % 2**32)
