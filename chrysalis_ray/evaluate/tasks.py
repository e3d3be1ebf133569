"""The stage of a run that asks tasks of lm-eval when all is chosen, and what the verdict tells of them.

    evaluation/lm_eval.json    the metrics of the seed, the best variant and the chosen one, and which items each got right

lm-eval runs in the process that leads the run; its questions go to the bodies, as those of probes do. They choose nothing:
whoever is to be asked is chosen before. An extra: nothing is imported where no task is named.
"""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist
from typing import Any

from chrysalis_ray.config.lm_eval import LmEval
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json, sha256_of, write_json
from chrysalis_ray.evaluate.probing import SEED, Ask
from chrysalis_ray.evaluate.proportions import paired_difference, wilson
from chrysalis_ray.evaluate.subjects import Candidate
from chrysalis_ray.evaluate.verdict import Choice


def check_tasks(asked: LmEval) -> None:
    """Before any training: raises EvaluationError where lm-eval is not installed, knows no such task, or cannot load its
    data."""
    from chrysalis_ray.evaluate.alone import open_harness

    open_harness().check_tasks(asked.tasks, folder_of(asked))


def ask_tasks(layout: RunLayout, asked: LmEval, choice: Choice, ask: Ask) -> str | None:
    """Ask every task that the experiment names; returns a sentence about it, None where it was done before."""
    if layout.tasks.exists():
        return None
    from chrysalis_ray.evaluate.alone import open_harness

    harness = open_harness()
    candidates = [
        Candidate(SEED),
        *(_candidate(layout, choice, name) for name in dict.fromkeys((choice.winner, choice.chosen))),
    ]
    base, names = Path(read_json(layout.base_manifest)["path"]), [each.name for each in candidates]
    panel = harness.Panel(base, None, names, lambda questions, decode: ask(candidates, questions))
    found, marks = harness.told_by(panel, asked.tasks, folder_of(asked), asked.limit)
    write_json(layout.tasks, {"asked_sha256": sha256_of(asked.model_dump(mode="json")), **found, "right": marks})
    return f"{', '.join(found['tasks'])} by lm-eval {found['version']}, asked of {', '.join(names)}"


def told_tasks(layout: RunLayout, evaluate: Any, choice: Choice) -> tuple[dict[str, Any], list[str]]:
    """What the verdict tells of the tasks, and a sentence each.

    Where a metric is the share of items that are right its interval is Wilson's, and differences are paired over the items and
    corrected (Bonferroni) for the number of merges and of such metrics, as those of probes are. Any other metric has a normal
    interval by lm-eval's standard error, where it has one, and is not compared.
    """
    if evaluate.lm_eval is None or not layout.tasks.exists():
        return {}, []
    written = read_json(layout.tasks)
    counted = sum(len(right[choice.chosen]) for right in written["right"].values())
    corrected = 1.0 - (1.0 - evaluate.confidence) / (max(1, len(choice.merges)) * max(1, counted))
    told: dict[str, Any] = {
        "version": written["version"],
        "confidence": evaluate.confidence,
        "difference_confidence": corrected,
        "tasks": {},
    }
    sentences = []
    for task, found in written["tasks"].items():
        if not found["candidates"][choice.chosen]:
            continue  # a group of tasks without a metric of its own: its tasks are told
        right = written["right"][task]
        candidates = {
            name: _intervals(metrics, right[name], evaluate.confidence) for name, metrics in found["candidates"].items()
        }
        differences = [
            {"of": choice.chosen, "against": other, "metric": metric}
            | dict(zip(("mean", "low", "high"), paired_difference(own, right[other][metric], corrected), strict=True))
            for metric, own in right[choice.chosen].items()
            for other in (choice.winner, SEED)
            if other != choice.chosen and metric in right[other]
        ]
        told["tasks"][task] = {
            "items": found["items"],
            "version": found["version"],
            "candidates": candidates,
            "differences": differences,
        }
        sentences.append(_sentence(task, choice.chosen, told["tasks"][task], written["version"]))
    return told, sentences


def folder_of(asked: LmEval) -> Path | None:
    return None if asked.folder is None else Path(asked.folder)


def _candidate(layout: RunLayout, choice: Choice, name: str) -> Candidate:
    return Candidate(name, str(layout.merge(name) if name in choice.merges else layout.adapter(name)))


def _intervals(metrics: dict[str, float], right: dict[str, list[int]], confidence: float) -> dict[str, dict[str, float]]:
    """Every metric with its interval, as far as one is known."""
    reach, found = NormalDist().inv_cdf((1 + confidence) / 2), {}
    for key, value in metrics.items():
        metric, gap, kept = key.partition(" ")
        if metric.endswith("_stderr"):
            continue
        error = metrics.get(f"{metric}_stderr{gap}{kept}")
        low, high = (None, None) if error is None else (value - reach * error, value + reach * error)
        if key in right:
            low, high = wilson(sum(right[key]), len(right[key]), confidence)
        found[key] = {"value": value} | ({} if low is None or high is None else {"low": low, "high": high})
    return found


def _sentence(task: str, chosen: str, found: dict[str, Any], version: str) -> str:
    """Its first metric that has an interval, if any has, and how that compares."""
    metric, own = min(found["candidates"][chosen].items(), key=lambda item: "low" not in item[1])
    interval = f" ({own['low']:.4f} to {own['high']:.4f})" if "low" in own else ""
    compared = "".join(
        f"; against {each['against']} {each['mean']:+.1%} (interval {each['low']:+.1%} to {each['high']:+.1%})"
        for each in found["differences"]
        if each["metric"] == metric
    )
    asked = f"Task {task} of lm-eval {version}, {found['items']} items"
    return f"{asked}: {metric} of {chosen} {own['value']:.4f}{interval}{compared}."
