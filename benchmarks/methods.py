"""Every merge method of the table on real populations: eight variants of the quickstart's base, one population per seed.

    python benchmarks/methods.py --seeds 1 2 3 4 5 --json
    python benchmarks/methods.py --seeds 1 --set population.tokens_per_variant=12288

A population is that of `experiments/quickstart.yaml` with another `rng_seed`, trained, merged and judged by the product's own
stages, in a run directory of its own; every variant trains to its end. Every method has its defaults, the mean also all its
weights. The winner is the best variant on select; what is told is loss on report minus the winner's, in nats per token, paired
over documents, with the interval of the bootstrap. `all seeds` is the mean over seeds, its interval that of the mean, with
documents drawn anew within every seed. Below zero the merge is better. `beats` counts seeds where the whole interval is below
zero, `loses` where it is above.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import yaml

from chrysalis_ray.core.records import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
SAMPLES = 2000
CONFIDENCE = 0.95
WEIGHTS = ("softmax", "geometric_median", "robust", "greedy")


def merges() -> list[dict[str, Any]]:
    """The whole table, RegMean on whole inputs, and the mean with every way to weigh."""
    from chrysalis_ray.config.merges import METHOD_NAMES

    plain = [{"method": method} for method in METHOD_NAMES]
    weighed = [{"method": "ensemble", "name": f"ensemble-{weights}", "weights": weights} for weights in WEIGHTS]
    whole = {"method": "regmean", "name": "regmean-whole", "space": "dense"}
    return [*plain, whole, *weighed, {"method": "ensemble", "name": "ensemble-all", "best_share": 1.0}]


def play(rng_seed: int, runs: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """One population, trained, merged, judged on both splits: the losses of every document under every candidate."""
    from training_stage import prepared

    from chrysalis_ray import lifecycle
    from chrysalis_ray.body.turn import Candidate
    from chrysalis_ray.evaluate.candidates import judged, sound_scores
    from chrysalis_ray.population.harvest import emerged

    asked = yaml.safe_load((ROOT / "experiments" / "quickstart.yaml").read_text())
    asked |= {"merge": merges(), "rng_seed": rng_seed, "evaluate": {"rows_per_domain": 16, "rows_per_report": 2}}
    asked["population"]["scheduler"] = {"type": "fifo"}
    experiment = runs / f"seed{rng_seed}.yaml"
    experiment.write_text(yaml.safe_dump(asked, sort_keys=False))
    run, base, branching, variants = prepared(experiment, runs, f"seed{rng_seed}", overrides)
    with lifecycle.bodies_for(run, base, variants, None) as bodies:
        run.story.bodies = bodies
        lifecycle.train(run, branching, variants, bodies)
        lifecycle.judge(run, bodies)
        names = judged(run.layout, emerged(run.layout))
        made = json.loads(run.layout.merges_manifest.read_text())
        candidates = [Candidate("seed", None), *(Candidate(name, str(run.layout.adapter(name))) for name in names)]
        candidates += [Candidate(name, str(run.layout.merge(name))) for name in made["candidates"]]
        report = bodies.judge(candidates, "report", run.experiment.evaluate.rows_per_domain)
    select = json.loads(run.layout.select_scores.read_text())["candidates"]
    return {
        "rng_seed": rng_seed,
        "variants": names,
        "failed": made["failed"],
        "select": select,
        "report": sound_scores(run.layout, report, "report", needed=["seed"]),
    }


def told(played: Mapping[str, Any]) -> dict[str, Any]:
    """A population as rows: every merge against the winner, with the bootstrap's samples of the difference."""
    from chrysalis_ray.evaluate.bootstrap import interval, resampled_losses
    from chrysalis_ray.evaluate.scores import DocumentScore, ReportScores, SelectScores

    select = SelectScores({name: [DocumentScore(*row) for row in rows] for name, rows in played["select"].items()}).losses()
    report = ReportScores({name: [DocumentScore(*row) for row in rows] for name, rows in played["report"].items()})
    winner = min(played["variants"], key=select.__getitem__)
    names = list(report.candidates)
    domains = np.array([report.domains.index(score.domain) for score in report.documents])
    tokens = np.array([score.tokens for score in report.documents], dtype=np.float64)
    losses = np.array([[score.loss_sum for score in report.of(name)] for name in names])
    samples_SC = resampled_losses(losses, tokens, domains, SAMPLES, played["rng_seed"])
    differences = samples_SC - samples_SC[:, [names.index(winner)]]
    rows = {}
    for place, name in enumerate(names):
        low, high = interval(differences[:, place], CONFIDENCE)
        rows[name] = {
            "select": select.get(name), "report": report.loss(name), "difference": report.loss(name) - report.loss(winner),
            "low": low, "high": high, "samples": differences[:, place],
        }  # fmt: skip
    chosen = min((name for name in select if name != "seed" and name in rows), key=select.__getitem__)
    variants = [report.loss(name) for name in played["variants"]]
    return {
        "rng_seed": played["rng_seed"],
        "winner": winner,
        "chosen_on_select": chosen,
        "mean_variant": float(np.mean(variants)) - report.loss(winner),
        "best_variant_on_report": min(variants) - report.loss(winner),
        "failed": played["failed"],
        "rows": {name: row for name, row in rows.items() if name not in played["variants"]},
    }


def table(populations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per method over all populations, best first."""
    from chrysalis_ray.evaluate.bootstrap import interval

    rows = []
    for name in {name: None for population in populations for name in population["rows"]}:
        own = [population["rows"][name] for population in populations if name in population["rows"]]
        low, high = interval(np.mean([row["samples"] for row in own], axis=0), CONFIDENCE)
        rows.append({
            "method": name, "seeds": len(own), "difference": float(np.mean([row["difference"] for row in own])),
            "low": low, "high": high,
            "beats": sum(row["high"] < 0.0 for row in own), "loses": sum(row["low"] > 0.0 for row in own),
            "chosen_on_select": sum(population["chosen_on_select"] == name for population in populations),
            "by_seed": [round(row["difference"], 5) for row in own],
        })  # fmt: skip
    return sorted(rows, key=lambda row: row["difference"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--runs", type=Path, help="where the run directories lie and stay; a temporary folder if not given")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "methods.json", help="also write JSON, by default here")
    parser.add_argument("--role", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.role:
        asked.role.write_text(json.dumps(play(asked.seeds[0], asked.runs, asked.set)))
        return
    populations = []
    with tempfile.TemporaryDirectory() as temporary:
        runs = asked.runs or Path(temporary)
        runs.mkdir(parents=True, exist_ok=True)
        for rng_seed in asked.seeds:  # a process each: Ray begins and ends with it
            answer, began = runs / f"seed{rng_seed}.json", time.monotonic()
            if not answer.exists():
                command = [sys.executable, __file__, "--role", str(answer), "--seeds", str(rng_seed), "--runs", str(runs)]
                command += [part for text in asked.set for part in ("--set", text)]
                subprocess.run(command, check=True, env={**os.environ}, stdout=subprocess.DEVNULL)
            populations.append(told(json.loads(answer.read_text())))
            print(
                f"seed {rng_seed}: {time.monotonic() - began:.0f} s, select chose {populations[-1]['chosen_on_select']}",
                flush=True,
            )
    rows = table(populations)
    print(f"{'merge minus winner, report':<28}{'mean':>9}{'95 %':>20}{'beats':>7}{'loses':>7}{'chosen':>8}")
    for row in rows:
        between = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
        print(
            f"{row['method']:<28}{row['difference']:>+9.4f}{between:>20}{row['beats']:>7}{row['loses']:>7}{row['chosen_on_select']:>8}"
        )
    if asked.json:
        plain = [{key: value for key, value in p.items() if key != "rows"} for p in populations]
        write_json(asked.json, {"machine": machine.describe(), "set": asked.set, "populations": plain, "table": rows})


if __name__ == "__main__":
    main()
