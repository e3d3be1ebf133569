"""How long a population stands still when a worker is killed: from the kill to the first step of the worker's next life.

    python benchmarks/recovery.py
    python benchmarks/recovery.py --workers 1 2 --json

A real run of the quickstart's population. Once two turns are committed, one worker gets SIGKILL. Measured from then: until a
new life of the body is in the journal, and until the next turn is committed, less the seconds that turn trained. What was
committed before the kill must be there afterwards, byte for byte; the run must end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import psutil

from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.core.weave import Weave

HERE = Path(__file__).resolve().parent
EXPERIMENT, RESULTS = HERE.parent / "experiments" / "quickstart.yaml", HERE / "results"
GOAL = 15.0  # seconds


def cuts(layout: RunLayout) -> list[Path]:
    return sorted((layout.store / "cuts").glob("*.json"))


def wait_for(ready: Any, process: subprocess.Popen[bytes], seconds: float = 600.0) -> float:
    """When `ready()` first held; exits if the run ends before."""
    deadline = time.time() + seconds
    while not ready():
        if process.poll() is not None or time.time() > deadline:
            sys.exit(f"the run ended, or took longer than {seconds:.0f} s")
        time.sleep(0.02)
    return time.time()


def measure(runs: Path, workers: int) -> dict[str, Any]:
    """One run with one kill."""
    layout = RunLayout(runs / "recovery")
    body = f"body={{workers: {workers}, cpus_per_worker: {1 / workers:g}}}"
    command = [sys.executable, "-m", "chrysalis_ray", "run", str(EXPERIMENT), "--runs", str(runs), "--name", "recovery"]
    with (runs / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--set", body], stdout=log, stderr=log)
        wait_for(lambda: len(cuts(layout)) >= 2, process)
        kept = {path.name: path.read_bytes() for path in cuts(layout)}
        tree = psutil.Process(process.pid).children(recursive=True)
        victim = next(child for child in tree if "BodyWorker" in " ".join(child.cmdline()))
        victim.kill()
        killed = time.time()
        lives = lambda: sum(turn["kind"] == "body.manifest" for turn in Weave(layout.weave).turns())  # noqa: E731
        alive = wait_for(lambda: lives() >= 2, process)
        wait_for(lambda: len(cuts(layout)) > len(kept), process)
        ended = process.wait()
    following = cuts(layout)[len(kept)]
    trained = next(iter(read_json(following)["body"]["results"].values()))["metrics"]["seconds"]
    return {
        "workers": workers,
        "new_life_seconds": round(alive - killed, 2),
        "stood_still_seconds": round(following.stat().st_mtime - killed - trained, 2),
        "nothing_lost": all((layout.store / "cuts" / name).read_bytes() == content for name, content in kept.items()),
        "exit_code": ended,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS / "recovery.json", help="also write JSON, by default here"
    )
    asked = parser.parse_args()
    rows = []
    for workers in asked.workers:
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"load_before": machine.load_now(), **measure(Path(folder), workers)})
        print(json.dumps(rows[-1], indent=2), flush=True)
    worst = max(row["stood_still_seconds"] for row in rows)
    print(f"stood still for at most {worst:.1f} s, {'within' if worst <= GOAL else 'beyond'} the goal of {GOAL:.0f} s")
    if asked.json:
        write_json(asked.json, {"machine": machine.describe(), "goal": GOAL, "rows": rows})


if __name__ == "__main__":
    main()
