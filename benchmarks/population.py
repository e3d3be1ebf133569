"""A whole population, ours against the script a competent user writes by hand: wall time and memory, as ratios of one run.

    python benchmarks/population.py                                quickstart work, ASHA on both sides
    python benchmarks/population.py --work 10 --scheduler fifo     ten times the tokens, every variant to its end
    python benchmarks/population.py --repeats 3 --json

Both sides start from the same prepared run directory (genome, base, tokens, adapter zero, variants) and end with every
variant trained as far as the scheduler let it. Wall time runs from before Ray is imported to `population.json` on our side, to
the end of the last trial on the other; memory is the peak of the whole process tree, Ray's daemons included. The baseline runs
with one trial at a time on all cores and with one per core, and the faster of the two counts; `--concurrency 1 2 8` adds
all eight at once, which is what memory is to be compared with.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import machine

from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json, write_json

HERE = Path(__file__).resolve().parent
EXPERIMENT = HERE.parent / "experiments" / "quickstart.yaml"
RESULTS = HERE / "results"
IDLE_LOAD = 0.7

Run = dict[str, Any]


class Bench:
    """One prepared run directory and what is measured on it."""

    def __init__(self, experiment: Path, overrides: Sequence[str], folder: Path) -> None:
        self.experiment, self.overrides, self.folder = experiment, list(overrides), folder
        folder.mkdir(parents=True, exist_ok=True)
        self.prepared = folder / "prepared"
        self.cores = os.cpu_count() or 1
        self.count = 0

    def prepare(self) -> None:
        """Genome, base, tokens, adapter zero, branch: before any clock runs."""
        self.stage("prepared", "--prepare")

    def chrysalis(self) -> Run:
        """Our training stage, on a fresh copy of the prepared run directory."""
        name = f"ours-{self.count}"
        subprocess.run(["cp", "-r", str(self.prepared), str(self.folder / name)], check=True)
        threads = int(
            read_json(RunLayout(self.prepared).run_manifest)["experiment"]["experiment"]["body"]["threads"] or self.cores
        )
        return {"side": "chrysalis", "concurrency": 1, "threads": threads, **self.stage(name)}

    def handwritten(self, concurrency: int) -> Run:
        """The baseline with so many trials at a time, cores shared evenly between them."""
        threads = max(1, self.cores // concurrency)
        options = ["--concurrency", str(concurrency), "--threads", str(threads)]
        return {"side": "handwritten", "concurrency": concurrency, "threads": threads, **self.baseline(options)}

    def without_ray(self) -> Run:
        """PEFT alone, one variant after the other in one process: every variant to its end, whatever the scheduler."""
        return {"side": "without-ray", "concurrency": 1, "threads": self.cores, **self.baseline(["--no-ray"])}

    def stage(self, name: str, *options: str) -> Run:
        sets = [part for override in self.overrides for part in ("--set", override)]
        return self.child("training_stage.py", str(self.experiment), str(self.folder), name, *options, *sets)

    def baseline(self, options: Sequence[str]) -> Run:
        return self.child("handwritten.py", str(self.prepared), *options)

    def child(self, script: str, *arguments: str) -> Run:
        """Run one side in a process tree of its own and put together what it and its watcher tell."""
        self.count += 1
        out = self.folder / f"{self.count}.json"
        place = 4 if script == "training_stage.py" else 2
        command = [sys.executable, str(HERE / script), *arguments]
        command.insert(1 + place, str(out))
        try:
            watched = machine.watch(command, os.environ, self.folder / f"{self.count}.log")
        except subprocess.CalledProcessError as error:
            sys.exit(f"{script} ended with {error.returncode}:\n{error.output}")
        told = read_json(out) if out.exists() else {}
        return {**told, **watched.to_json()}


def figures(run: Run) -> dict[str, Any]:
    """What one run came to. Seconds; memory in MiB; `start_up` sums, over trials, the time to the first optimizer step."""
    steps = run.get("variant_steps") or sum(row["steps"] for row in run["variants"])
    if run["side"] == "chrysalis":
        start_up, train, lanes = run["training_began"] - run["began"], run["train_seconds"], 1
        rest = {
            "body_and_first_turn": run["training_began"] - run["ray_up"],
            "scoring_and_seeds": run["turn_seconds"] - run["train_seconds"],
            "between_turns": run["last_cut"] - run["training_began"] - run["turn_seconds"],
            "harvest": run["ended"] - run["last_cut"],
        }
    else:
        rows, lanes = run["variants"], run["concurrency"]
        start_up = run["ray_up"] - run["began"] + sum(row["training_began"] - row["trial_began"] for row in rows)
        train = sum(row["train_seconds"] for row in rows)
        rest = {"scoring": sum(row["evaluate_seconds"] for row in rows)}
    return {
        "wall": run["ended"] - run["began"],
        "start_up": start_up,
        "train": train / lanes,
        "core_ms_per_variant_step": 1000 * train * run["threads"] / steps,
        "variant_steps": steps,
        "reports": sum(row["report"] for row in run["variants"]),
        "peak_mib": run["peak_mib"],
        "cpu_seconds": run["cpu_seconds"],
        **rest,
    }


def middle(runs: Sequence[Run]) -> dict[str, float]:
    """Median of each figure over repeats; the peak of memory over all of them."""
    rows = [figures(run) for run in runs]
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return {**median, "peak_mib": max(row["peak_mib"] for row in rows)}


def losses_apart(ours: Run, other: Run) -> dict[str, Any]:
    """The largest difference of final select losses over the variants that both sides trained equally long."""
    mine = {row["variant"]: row for row in ours["variants"]}
    pairs = [(mine[row["variant"]], row) for row in other["variants"]]
    same = [abs(a["select_loss"] - b["select_loss"]) for a, b in pairs if a["steps"] == b["steps"]]
    return {"variants": len(same), "largest": max(same, default=None)}


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians of every side, the baseline's better way of running, and the ratios baseline / ours."""
    by_side: dict[str, list[Run]] = {}
    for run in runs:
        by_side.setdefault(f"{run['side']}-{run['concurrency']}" if run["side"] == "handwritten" else run["side"], []).append(
            run
        )
    sides = {name: middle(rows) for name, rows in by_side.items()}
    best = min((name for name in sides if name.startswith("handwritten")), key=lambda name: sides[name]["wall"])
    ours, theirs = sides["chrysalis"], sides[best]
    ratios = {name: theirs[name] / ours[name] for name in ("wall", "start_up", "core_ms_per_variant_step", "peak_mib")}
    together = f"handwritten-{len(by_side['chrysalis'][0]['variants'])}"
    if together in sides:
        ratios["peak_mib_all_at_once"] = sides[together]["peak_mib"] / ours["peak_mib"]
    return {
        "sides": sides,
        "baseline": best,
        "ratios": ratios,
        "losses_apart": losses_apart(by_side["chrysalis"][-1], by_side[best][-1]),
    }


ROWS = (
    ("wall", "wall time, s", "{:.1f}"),
    ("peak_mib", "peak memory, MiB", "{:.0f}"),
    ("start_up", "start-up, summed over trials, s", "{:.1f}"),
    ("train", "optimizer steps, wall s", "{:.1f}"),
    ("variant_steps", "steps of variants trained", "{:.0f}"),
    ("core_ms_per_variant_step", "core-ms per step of a variant", "{:.1f}"),
    ("cpu_seconds", "CPU time of all processes, s", "{:.0f}"),
)


def print_table(told: Mapping[str, Any]) -> None:
    """Sides beside each other; the last column is baseline / ours."""
    sides, best = told["sides"], told["baseline"]
    names = sorted(sides, key=lambda name: (name != "chrysalis", name))
    print(f"{'':<34}" + "".join(f"{name:>16}" for name in names) + f"{best + ' / ours':>24}")
    for key, title, form in ROWS:
        ratio = f"{sides[best][key] / sides['chrysalis'][key]:.2f}x"
        print(f"{title:<34}" + "".join(f"{form.format(sides[name][key]):>16}" for name in names) + f"{ratio:>24}")
    ours = sides["chrysalis"]
    parts = ("start_up", "train", "scoring_and_seeds", "between_turns", "harvest")
    print("ours: " + ", ".join(f"{part.replace('_', ' ')} {ours[part]:.1f} s" for part in parts))
    apart = told["losses_apart"]
    if apart["variants"]:
        print(
            f"final select losses of {apart['variants']} equally long trained variants differ by at most {apart['largest']:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experiment", type=Path, default=EXPERIMENT)
    parser.add_argument("--work", type=float, default=1, help="times the tokens of the experiment")
    parser.add_argument("--scheduler", choices=("asha", "fifo"), default="asha")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--concurrency", type=int, nargs="+", help="the baseline's trials at a time; by default 1 and one per core"
    )
    parser.add_argument("--without-ray", action="store_true", help="also PEFT alone, one variant after the other")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override the experiment")
    parser.add_argument("--wait", type=float, default=0, metavar="MINUTES", help="wait so long for a load below 0.7")
    parser.add_argument("--folder", type=Path, help="where run directories lie; a temporary folder if not given")
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS, help="write JSON to this file; here if not named")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        told = measure(asked, asked.folder or Path(temporary))
    print_table(told["summary"])
    if asked.json:
        path = asked.json if asked.json != RESULTS else RESULTS / f"population-{asked.scheduler}-x{asked.work:g}.json"
        write_json(path, told)


def measure(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare, then run both sides in turns."""
    bench = Bench(asked.experiment.resolve(), settings(asked), folder.resolve() / f"{asked.scheduler}-x{asked.work:g}")
    bench.prepare()
    layout = RunLayout(bench.prepared)
    names = read_json(layout.branch_manifest)["variants"]
    variants, first = len(names), read_json(layout.variant(names[0]))
    described = machine.describe()
    room = f"{described['cores']} cores, {described['memory_gib']} GiB"
    lanes = f"steps of {first['rows_per_step']} rows x {first['sequence_length']} tokens"
    print(f"{variants} variants, {asked.scheduler}, work x {asked.work:g}, {lanes}; {room}")
    load, runs = machine.wait_until_idle(IDLE_LOAD, asked.wait * 60), []
    ways = asked.concurrency or sorted({1, bench.cores})
    for repeat in range(asked.repeats):
        runs += [progress(bench.chrysalis()), *(progress(bench.handwritten(way)) for way in ways)]
        if asked.without_ray and repeat == 0:
            runs.append(progress(bench.without_ray()))
        best = summary(runs)["baseline"]
        ways = [int(best.rpartition("-")[2])]  # the faster way from here on
    return {
        "machine": described,
        "load_before": load,
        "experiment": asked.experiment.name,
        "overrides": bench.overrides,
        "work": asked.work,
        "scheduler": asked.scheduler,
        "variants": variants,
        "geometry": {name: first[name] for name in ("rows_per_step", "sequence_length", "steps", "chunk_steps")},
        "base_parameters": read_json(layout.base_manifest)["parameters"],
        "summary": summary(runs),
        "runs": runs,
    }


def settings(asked: argparse.Namespace) -> list[str]:
    """What the experiment is told on top of its file."""
    from chrysalis_ray.config.loading import load_experiment

    overrides = list(asked.set)
    if asked.scheduler == "fifo":
        overrides.append("population.scheduler={type: fifo}")
    if asked.work != 1:
        tokens = load_experiment(asked.experiment, overrides).experiment.population.tokens_per_variant
        overrides.append(f"population.tokens_per_variant={round(tokens * asked.work)}")
    return overrides


def progress(run: Run) -> Run:
    """Say on stderr that a run is done."""
    row = figures(run)
    line = f"{run['side']} x{run['concurrency']}: {row['wall']:.1f} s, {row['peak_mib']:.0f} MiB"
    print(f"{line}, load by others {run['foreign_load']}", file=sys.stderr, flush=True)
    return run


if __name__ == "__main__":
    main()
