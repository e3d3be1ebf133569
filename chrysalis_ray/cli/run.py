"""`chrysalis run`: the main job."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from chrysalis_ray.cli.arguments import Experiment, Json, Runs, Set
from chrysalis_ray.cli.outcome import print_json
from chrysalis_ray.cli.plan import show_plan
from chrysalis_ray.core.layout import RunLayout, is_run_name


def _plain_name(name: str | None) -> str | None:
    if name is not None and not is_run_name(name):
        raise typer.BadParameter(f"{name!r} is not one word of at most 64 letters, digits, dots and dashes")
    return name


def run(
    experiment: Experiment,
    set: Set = None,
    runs: Runs = Path("runs"),
    name: Annotated[
        str | None, typer.Option(callback=_plain_name, help="Name of the run directory; the experiment's name if not given.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster (`auto` finds it); else a local one.")] = None,
    json: Json = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> int:  # fmt: skip
    """Grow a population from an experiment.

    Branch, train, merge, judge. The same command again goes on after any end: finished stages are skipped.

    \b
    chrysalis run experiments/quickstart.yaml
    chrysalis run experiments/quickstart.yaml --set population.variants=4 --name four
    """
    if dry_run:
        return show_plan(experiment, set or [], json, runs, name, address=address)
    from chrysalis_ray.body.machine import machine_at
    from chrysalis_ray.cli.story import TerminalStory
    from chrysalis_ray.config.loading import load_experiment
    from chrysalis_ray.lifecycle import grow
    from chrysalis_ray.training.planning.choice import chooser
    from chrysalis_ray.training.planning.forecast import came

    loaded = load_experiment(experiment, set or [], chooser(runs, name, look=partial(machine_at, address)))
    root = runs / (loaded.experiment.name if name is None else name)
    layout = RunLayout(root.absolute())
    fresh = not layout.run_manifest.exists() and not loaded.candidates  # the plan is one of the run after the probe
    stream = sys.stderr if json else sys.stdout  # stdout belongs to the JSON, whatever a library prints
    with TerminalStory(stream) as story, contextlib.redirect_stdout(stream):
        verdict = grow(loaded, runs.absolute(), story, name, address)
        if told := came(layout, story.seconds if fresh else None):
            story.stage("plan", told)
    if json:
        print_json({"run": str(root.absolute()), "verdict": verdict})
    else:
        _print_next(root)
    return 0


def _print_next(root: Path) -> None:
    """The three things to do next."""
    print(f"\nlook      {root / 'report.html'}  (or: chrysalis report {root})")
    print(f"""use       PeftModel.from_pretrained(base, "{root / "imago"}")  (the base: {root / "imago" / "README.md"})""")
    if any((root / "tracking" / "wandb").glob("offline-run-*")):
        print(f"compare   wandb sync {root / 'tracking' / 'wandb'}/offline-run-*  (needs a W&B login)")
    else:
        print(f"compare   chrysalis report {root} --json  (every variant and merge; W&B: set tracking.wandb)")
