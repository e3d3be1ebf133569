"""The tune run: unmodified Ray Tune steers variants that live in one packed body."""

from __future__ import annotations

import os
from collections.abc import Sequence

from chrysalis_ray.body.cluster import processes_at_once, room_per_node
from chrysalis_ray.body.ledger import HOLDS
from chrysalis_ray.body.manifest import Bodies
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import Variant
from chrysalis_ray.population.branch import Branching
from chrysalis_ray.population.listener import PopulationListener, UntilBodyLost, seed_generators
from chrysalis_ray.population.search import make_scheduler, make_searcher, mutable_fields
from chrysalis_ray.population.words import METRIC, MODE

TRIAL_MEMORY = 256 * 1024 * 1024  # bytes a trial process reserves where there is room; it takes no CPU from the body


def run_population(
    branching: Branching, variants: Sequence[Variant], layout: RunLayout, bodies: Bodies, listener: PopulationListener
) -> None:
    """Run every variant to its end, its eviction or its scheduler's decision. Returns when Tune has nothing left to do.

    `variants` are those that were branched; a searcher that proposes makes its own from `branching`.

    What came of it is omega's to tell (`summary`): Tune's own files are a transport and are thrown away.
    """
    from ray import tune

    from chrysalis_ray.population.tuned import Trial, light_trials

    experiment, slots = branching.experiment, bodies.plan.morphology.places
    population = experiment.population
    seed_generators(experiment.rng_seed)
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(processes_at_once())  # Tune reads it when it begins
    trials = population.variants if population.pauses else slots  # those who wake may be more than there are slots
    fixed = {
        "omega": bodies.plan.omega_name,
        "namespace": bodies.plan.namespace,
        "variants": str(layout.variants),
        "memory": trial_memory(room_per_node(), trials),
    }
    mutable = mutable_fields(population, branching.domains)
    if population.proposes:
        from chrysalis_ray.population.propose import make_proposer

        searcher, space = make_proposer(branching, layout, bodies.omega, slots), fixed
    else:
        searcher, space = make_searcher(variants, fixed, mutable, slots)
    tuner = tune.Tuner(
        Trial,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode=MODE,
            search_alg=searcher,
            scheduler=make_scheduler(population),
            num_samples=population.variants,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"{trial.config['variant']}_{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="population",
            storage_path=str(layout.tune),
            stop=UntilBodyLost(bodies.lost, experiment.rng_seed),
            verbose=0,
            callbacks=[listener],
            failure_config=tune.FailureConfig(max_failures=population.max_failures),
            # By default a trial that is stopped writes a checkpoint first; if its process dies meanwhile, Tune forgets the
            # decision, starts it again and lets it go on, for a rung decides once.
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_frequency=1 if mutable else 0, num_to_keep=HOLDS if mutable else None, checkpoint_at_end=False
            ),
        ),
    )
    with light_trials():
        tuner.fit()


def trial_memory(room: Sequence[float], slots: int) -> int:
    """Bytes that a trial may reserve so that `slots` of them fit on nodes with this `room`, at most `TRIAL_MEMORY`.

    A turn starts when every slot's trial has asked: a trial that never fits would hold up every turn. Of nodes with m bytes
    the sum of floor(m / t) is at least sum(m) / t minus the number of nodes, hence the divisor.
    """
    return max(1, min(TRIAL_MEMORY, int(sum(room) / (slots + len(room)))))
