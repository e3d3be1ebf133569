"""What the plan said before the run, and what came, as numbers of the same names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.report.reading import mapping, number, public_manifest

TRAINING, WORKER, RUN = "seconds of training", "MiB of the first worker", "seconds of the whole run"
MIB = 1 << 20


def plan_and_run(layout: RunLayout, population: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """(planned, measured), each by name. The whole run is told once it is over, and if it went through in one go."""
    plan = public_manifest(layout.plan) or {}
    said, came = mapping(plan.get("said")), mapping(plan.get("came"))
    time, memory, body = mapping(said.get("time")), mapping(said.get("memory")), mapping(said.get("body"))
    total, context = number(memory.get("total")), number(memory.get("process")) or 0.0
    on_gpu = bool(number(body.get("gpus_per_worker")))  # there torch does not see the context of the driver
    planned = {
        TRAINING: number(time.get("train_expected")),
        WORKER: None if total is None else (total - (context if on_gpu else 0.0)) / MIB,
        RUN: number(time.get("expected")),
    }
    rows = mapping(population.get("variants")).values()
    peaks = [number(mapping(mapping(row).get("metrics")).get("peak_memory")) or 0.0 for row in rows]
    measured = {
        TRAINING: number(population.get("train_seconds")),
        WORKER: max(peaks, default=0.0) / MIB or None,
        RUN: number(came.get("wall_seconds")),
    }
    return _known(planned), _known(measured)


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
