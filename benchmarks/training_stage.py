"""Our side: the training stage of a prepared run, from before `ray.init` to `population.json`, in a process of its own.

python benchmarks/training_stage.py EXPERIMENT RUNS NAME OUT.json [--set a.b=c ...]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chrysalis_ray import lifecycle
from chrysalis_ray.config.loading import load_experiment
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import Variant, read_json, write_json


class Stopwatch:
    """Listens to the story; notes when the first turn began, which only the body knows."""

    def __init__(self, layout: RunLayout) -> None:
        self.layout = layout
        self.bodies: Any = None
        self.stages: dict[str, float] = {}
        self.training_began = 0.0

    def stage(self, name: str, sentence: str) -> None:
        self.stages.setdefault(name, time.time())

    def population(self, variants: Sequence[Variant]) -> None:
        self.stages["population"] = time.time()

    def row(self, row: dict[str, Any]) -> None:
        if not self.training_began:  # nobody has decided yet, so the first turn is the only one
            self.training_began = cuts(self.layout)[0]["written"] - self.bodies.describe()["train_seconds"]

    def conclusion(self, variant_id: str, state: str, reason: str | None) -> None:
        pass


def cuts(layout: RunLayout) -> list[dict[str, Any]]:
    """Every cut of the run: when it was written, how many variants it has, the seconds of its optimizer steps."""
    told = []
    for path in sorted((layout.store / "cuts").glob("*.json")):
        results = list(read_json(path)["body"]["results"].values())
        told.append({"written": path.stat().st_mtime, "variants": len(results), "seconds": results[0]["metrics"]["seconds"]})
    return told


def prepare(experiment: Path, runs: Path, name: str, overrides: Sequence[str]) -> RunLayout:
    """Everything before training: genome, base, tokens, seed, branch. What is there already is kept."""
    run, *_ = prepared(experiment, runs, name, overrides)
    return run.layout


def prepared(
    experiment: Path, runs: Path, name: str, overrides: Sequence[str]
) -> tuple[Any, dict[str, Any], Any, list[Variant]]:
    loaded = load_experiment(experiment, overrides)
    layout = RunLayout((runs / name).resolve())
    run = lifecycle.open_run(loaded, layout, Stopwatch(layout))
    genome = lifecycle.seal_genome(run)
    base = lifecycle.pin_base(run, genome)
    lifecycle.tokenise(run, genome, base)
    branching = lifecycle.branching_of(run, genome, base, lifecycle.write_seed(run, base))
    return run, base, branching, lifecycle.branch(run, branching)


def measure(experiment: Path, runs: Path, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Train the population and say what it took."""
    run, base, branching, variants = prepared(experiment, runs, name, overrides)
    watch = run.story
    began = time.time()
    with lifecycle.bodies_for(run, base, variants, None) as bodies:
        watch.bodies = bodies
        lifecycle.train(run, branching, variants, bodies)
        ended = time.time()
    manifest, written = read_json(run.layout.population_manifest), cuts(run.layout)
    return {
        "began": began,
        "ray_up": watch.stages["body"],
        "training_began": watch.training_began,
        "last_cut": written[-1]["written"],
        "ended": ended,
        "turns": len(written),
        "train_seconds": sum(cut["seconds"] for cut in written),
        "turn_seconds": manifest["train_seconds"],
        "variant_steps": sum(cut["variants"] for cut in written) * variants[0].chunk_steps,
        "packs": [cut["variants"] for cut in written],
        "variants": [
            {
                "variant": name,
                "report": row["chunks"],
                "steps": row["metrics"]["step"],
                "select_loss": row["metrics"]["select_loss"],
            }
            for name, row in manifest["variants"].items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--prepare", action="store_true", help="only prepare the run directory")
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.experiment, arguments.runs, arguments.name, arguments.set)
    else:
        write_json(arguments.out, measure(arguments.experiment, arguments.runs, arguments.name, arguments.set))


if __name__ == "__main__":
    main()
