"""What the controller costs: the time between turns in which the body waits for omega, Tune and the trials, as a share of wall.

    python benchmarks/controller.py
    python benchmarks/controller.py --variants 32 --json

All variants train together in one body under FIFO, so that every turn has all of them. The clock runs from the start of the
first turn to the last cut; what is not inside a turn is the controller's. Starting Ray is told beside it, not in it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import machine
import population

from chrysalis_ray.core.records import write_json

RESULTS = Path(__file__).resolve().parent / "results"
GOAL = 0.05


def measure(variants: int, tokens: int, reports: int, folder: Path) -> dict[str, Any]:
    """Seconds of the training stage of so many variants, inside and between its turns."""
    settings = [
        f"population.variants={variants}",
        f"body.slots={variants}",
        f"population.tokens_per_variant={tokens}",
        f"population.reports={reports}",
        "population.scheduler={type: fifo}",
    ]
    bench = population.Bench(population.EXPERIMENT, settings, folder)
    bench.prepare()
    run = bench.chrysalis()
    clock = run["last_cut"] - run["training_began"]
    between = clock - run["turn_seconds"]
    return {
        "variants": variants,
        "turns": run["turns"],
        "clock_seconds": clock,
        "turn_seconds": run["turn_seconds"],
        "optimizer_seconds": run["train_seconds"],
        "between_seconds": between,
        "share": between / clock,
        "between_ms_per_report": 1000 * between / (run["turns"] * variants),
        "start_up_seconds": run["training_began"] - run["began"],
        "foreign_load": run["foreign_load"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variants", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8192, help="per variant")
    parser.add_argument("--reports", type=int, default=4)
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "controller.json", help="also write JSON")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(asked.variants, asked.tokens, asked.reports, Path(folder))
    print(
        f"{row['variants']} variants, {row['turns']} turns: {row['clock_seconds']:.1f} s, {row['between_seconds']:.1f} s "
        f"between turns ({row['share']:.1%}, goal {GOAL:.0%}; {row['between_ms_per_report']:.0f} ms per report); "
        f"start-up {row['start_up_seconds']:.0f} s"
    )
    if asked.json:
        write_json(asked.json, {"machine": machine.describe(), "goal": GOAL, "row": row})


if __name__ == "__main__":
    main()
