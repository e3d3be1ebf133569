"""What `chrysalis plan` says after measuring, against what then comes: peak memory of a worker and wall time of the run.

    python benchmarks/plan_accuracy.py
    python benchmarks/plan_accuracy.py --only quickstart --json

Each experiment measures, plans and runs in a folder of its own, by the command line as a user does; nothing is shared, so that
every run makes its base. The machine should have nothing else to do: a plan cannot know who else will want it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json, write_json

HERE = Path(__file__).resolve().parent
EXPERIMENTS = HERE.parent / "experiments"
RESULTS = HERE / "results"
LONG_LANES = "blueprint.lanes={sequence_length: 256, rows_per_step: 4, rows_per_microstep: 2}"

ALONE = (
    "blueprint.lora.use_dora=true",
    "body.slots=1",
    "merge=[{method: winner}]",
    "population.scheduler={type: fifo}",
    "population.variants=3",
    "population.reports=4",
)

# name -> experiment, and what is set: another scheduler, a base and gradients sharded over two workers, longer lanes with
# accumulation, two bodies at once, and variants that train alone by plain peft.
WORK: dict[str, tuple[str, tuple[str, ...]]] = {
    "quickstart": ("quickstart.yaml", ("population.tokens_per_variant=24576",)),
    "pbt": ("pbt.yaml", ("population.tokens_per_variant=16384",)),
    "zero3": ("zero3_cpu.yaml", ("population.tokens_per_variant=8192", "body.gradients=sharded")),
    "long-lanes": ("pbt.yaml", ("population.tokens_per_variant=16384", LONG_LANES)),
    "two-bodies": ("pbt.yaml", ("population.tokens_per_variant=16384", "body={count: 2, threads: 1, slots: 4}")),
    "solo-dora": ("quickstart.yaml", ("population.tokens_per_variant=12288", *ALONE)),
}
GOALS = {"memory": 0.15, "time": 0.30}


def look(name: str, folder: Path) -> dict[str, Any]:
    """Measure, plan and run one experiment; what was said, what came and how far they are apart."""
    file, settings = WORK[name]
    sets = [word for setting in settings for word in ("--set", setting)]
    common = [str(EXPERIMENTS / file), "--runs", str(folder), *sets]
    began = time.monotonic()
    chrysalis("plan", *common, "--measure", "--json")
    measured = time.monotonic() - began
    load = machine.load_now()
    chrysalis("run", *common, "--name", name, "--json")
    content = read_json(RunLayout(folder / name).plan)
    said, told = content["said"], content["came"]
    expected, memory = said["time"]["expected"], said["memory"]["total"]
    return {
        "experiment": name,
        "overrides": list(settings),
        "load_before": load,
        "measure_seconds": measured,
        "memory_said_mib": memory / 2**20,
        "memory_came_mib": told["peak_memory"] / 2**20,
        "memory_error": memory / told["peak_memory"] - 1.0,
        "time_said": expected,
        "time_span": [said["time"]["least"], said["time"]["most"]],
        "time_came": told["wall_seconds"],
        "time_error": expected / told["wall_seconds"] - 1.0,
        "said": said["time"],
        "training_came": read_json(RunLayout(folder / name).population_manifest)["train_seconds"],
    }


def chrysalis(*arguments: str) -> None:
    command = [sys.executable, "-m", "chrysalis_ray", *arguments]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"chrysalis {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(WORK), default=list(WORK))
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "plan_accuracy.json", help="also write JSON")
    asked = parser.parse_args()
    print(f"{'':<12}{'memory said':>13}{'came':>10}{'error':>8}{'time said':>12}{'came':>8}{'error':>8}")
    rows = []
    for name in asked.only:
        with tempfile.TemporaryDirectory() as folder:
            row = look(name, Path(folder))
        rows.append(row)
        print(
            f"{name:<12}{row['memory_said_mib']:>9.0f} MiB{row['memory_came_mib']:>6.0f} MiB{row['memory_error']:>+8.0%}"
            f"{row['time_said']:>10.0f} s{row['time_came']:>6.0f} s{row['time_error']:>+8.0%}",
            flush=True,
        )
    for figure, goal in GOALS.items():
        worst = max(abs(row[f"{figure}_error"]) for row in rows)
        print(f"{figure}: at most {worst:.0%} off, {'within' if worst <= goal else 'beyond'} the goal of {goal:.0%}")
    if asked.json:
        write_json(asked.json, {"machine": machine.describe(), "goals": GOALS, "rows": rows})


if __name__ == "__main__":
    main()
