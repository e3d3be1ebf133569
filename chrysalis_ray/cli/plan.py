"""`chrysalis plan`: what would be built, without building it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from chrysalis_ray.cli.arguments import Experiment, Json, Runs, Set
from chrysalis_ray.cli.outcome import DOES_NOT_FIT, print_json
from chrysalis_ray.core.layout import CACHE, CacheLayout, RunLayout


def plan(
    experiment: Experiment,
    set: Set = None,
    runs: Runs = Path("runs"),
    measure: Annotated[
        bool, typer.Option("--measure", help="First measure this machine, in seconds; kept in the cache beside the runs.")
    ] = False,
    json: Json = False,
) -> int:
    """Show what an experiment would build.

    Variants, tokens, slots, memory and time on this machine; exit 3 if it does not fit. Figures are those that were measured
    on this machine, else estimates. Nothing is written without --measure.

    \b
    chrysalis plan experiments/quickstart.yaml --set population.variants=16
    chrysalis plan experiments/quickstart.yaml --measure
    """
    return show_plan(experiment, set or [], json, runs, measuring=measure)


def show_plan(
    experiment: Path,
    overrides: list[str],
    as_json: bool,
    runs: Path,
    name: str | None = None,
    *,
    measuring: bool = False,
    address: str | None = None,
) -> int:
    """Print the plan of `experiment`, for this machine or for the cluster at `address`, and return the exit code that belongs
    to it. Imports neither torch nor, without an address, Ray."""
    from chrysalis_ray.body.machine import machine_at
    from chrysalis_ray.config.loading import load_experiment
    from chrysalis_ray.training.planning.choice import chooser
    from chrysalis_ray.training.planning.heats import with_probe
    from chrysalis_ray.training.planning.planner import plan as make_plan

    hardware, cache = machine_at(address), CacheLayout(runs.absolute() / CACHE)
    loaded = load_experiment(experiment, overrides, chooser(runs, name, hardware))
    if loaded.candidates:
        from chrysalis_ray.population.probing import decided

        loaded = decided(loaded, RunLayout((runs / (name or loaded.experiment.name)).absolute()))
    if measuring:
        from chrysalis_ray.training.planning.measure import measure

        measure(loaded, hardware, cache, progress=lambda line: print(line, file=sys.stderr, flush=True))
    planned = with_probe(make_plan(loaded, hardware, cache), loaded, hardware, cache)
    if as_json:
        print_json(planned.to_json())
    else:
        print("\n".join(planned.lines()))
    return 0 if planned.fits else DOES_NOT_FIT
