"""`chrysalis plan`: what would be built, without building it."""

from __future__ import annotations

from pathlib import Path

from chrysalis_ray.cli.arguments import Experiment, Json, Set
from chrysalis_ray.cli.outcome import DOES_NOT_FIT, print_json


def plan(experiment: Experiment, set: Set = None, json: Json = False) -> int:
    """Show what an experiment would build.

    Variants, tokens, bodies, memory and time on this machine; exit 3 if it does not fit. Nothing is written.

    \b
    chrysalis plan experiments/quickstart.yaml --set population.variants=16
    """
    return show_plan(experiment, set or [], json)


def show_plan(experiment: Path, overrides: list[str], as_json: bool) -> int:
    """Print the plan of `experiment` and return the exit code that belongs to it. Imports neither torch nor Ray."""
    from chrysalis_ray.config.loading import load_experiment
    from chrysalis_ray.training.hardware import Hardware
    from chrysalis_ray.training.planner import plan as make_plan

    planned = make_plan(load_experiment(experiment, overrides), Hardware.local())
    if as_json:
        print_json(planned.to_json())
    else:
        print("\n".join(planned.lines()))
    return 0 if planned.fits else DOES_NOT_FIT
