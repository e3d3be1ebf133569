"""What was measured on this machine, as a record in the runs' cache. Read without torch.

A measurement belongs to a *question*: the sizes of the base, the targets, the rank and optimizer of the adapters, the body,
the device and the versions of the libraries. Beside it stand the lanes it was taken at (rows x tokens of a micro-step): the
same question at other lanes is answered by the nearest, and the plan says so.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from chrysalis_ray.config.population_checks import largest_rank
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.core.layout import CacheLayout
from chrysalis_ray.core.records import read_json, sha256_of, write_json
from chrysalis_ray.training.passes import threads_of
from chrysalis_ray.training.planning.hardware import Hardware
from chrysalis_ray.training.planning.pace import Pace
from chrysalis_ray.training.planning.shapes import ModelShape

FORMAT = 1
LIBRARIES = ("torch", "transformers", "deepspeed")


@dataclass(frozen=True)
class Lane:
    """What one variant brings to a micro-step of a body: `rows` (over all workers) of `length` tokens."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.length}"


@dataclass(frozen=True)
class Point:
    """One thing that was timed: the median seconds of an optimizer step, and the most memory so far in bytes."""

    variants: int
    rows: int
    length: int
    microsteps: int
    seconds: float
    peak: int = 0


@dataclass(frozen=True)
class Holding:
    """Bytes on one worker: before it holds anything, with the base, per slot, and per token of those it computes at once."""

    process: int
    base: int
    per_slot: int
    per_token: float

    def total(self, slots: int, tokens: float) -> int:
        return round(self.process + self.base + slots * self.per_slot + tokens * self.per_token)


@dataclass(frozen=True)
class Measurement:
    """The answer. `slots` were measured of `asked` ones; where that is fewer, more did not fit into memory.

    `residual` is the root mean square of the relative errors of `pace` at `points`, `rejected` that of the other form of the
    law. `start` are the seconds in which a process of this machine has imported what a worker imports, `gather` those in
    which a sharded base is gathered once, `pretrain` those per token in which an embedded base learns all its weights.
    """

    question: Mapping[str, Any]
    lane: Lane
    asked: int
    slots: int
    pace: Pace
    residual: float
    rejected: float
    holding: Holding
    start: float
    gather: float
    pretrain: float
    points: tuple[Point, ...]
    date: str

    def to_json(self) -> dict[str, Any]:
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        nested = {name: asdict(plain[name]) for name in ("lane", "holding", "pace")}
        return {**plain, **nested, "points": [asdict(point) for point in self.points], "format": FORMAT}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Measurement:
        """Raises KeyError, TypeError or ValueError for what `to_json` cannot have written."""
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']!r}, not {FORMAT}")
        plain = {field.name: value[field.name] for field in fields(cls)}
        nested = {"lane": Lane(**plain["lane"]), "holding": Holding(**plain["holding"]), "pace": Pace(**plain["pace"])}
        return cls(**{**plain, **nested, "points": tuple(Point(**point) for point in plain["points"])})


def lane_of(loaded: LoadedExperiment) -> Lane:
    lanes = loaded.blueprint.lanes
    return Lane(lanes.rows_per_microstep or lanes.rows_per_step, lanes.sequence_length)


def question_of(loaded: LoadedExperiment, shape: ModelShape, hardware: Hardware) -> dict[str, Any]:
    """What a measurement for this experiment on this machine depends on, as JSON content."""
    body, on_gpu, lora = loaded.body, (loaded.body.gpus_per_worker or 0) > 0, loaded.blueprint.lora
    sizes = {key: value for key, value in asdict(shape).items() if key not in ("name", "family", "window")}
    return {
        "base": sizes,
        "targets": sorted(loaded.blueprint.worn.targets or ()),
        **({"exclude": sorted(lora.exclude), "layers": list(lora.layers or ())} if lora.is_narrowed else {}),
        "rank": largest_rank(loaded),
        **({"patterns": patterns.to_json()} if (patterns := loaded.blueprint.patterns) else {}),
        "optimizer": loaded.blueprint.optimizer.type,
        "workers": body.workers,
        "zero_stage": body.zero_stage,
        "offload": body.offload,
        "precision": body.precision,
        "lanes": body.lanes,
        "activation_checkpointing": body.activation_checkpointing,
        "compile": body.compile,
        "gradients": body.gradients,
        "disk": body.nvme_path,
        "threads": None if on_gpu else threads_of(body),
        "device": hardware.gpu_name if on_gpu else f"{hardware.cpus} x {hardware.processor or platform.machine()}",
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        **(
            {"solo": loaded.blueprint.worn.model_dump(mode="json"), "peft": _version("peft")}
            if loaded.blueprint.worn.solo
            else {}
        ),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def keep_measurement(cache: CacheLayout, measurement: Measurement) -> Path:
    path = cache.measurement(sha256_of(dict(measurement.question)), measurement.lane.name)
    write_json(path, measurement.to_json())
    return path


def find_measurement(
    loaded: LoadedExperiment, shape: ModelShape | None, hardware: Hardware, cache: CacheLayout | None
) -> Measurement | None:
    """The measurement of this experiment's question at its lanes, else at the nearest; None where nobody measured.

    A file that cannot be read counts as none: to measure again replaces it.
    """
    if shape is None or cache is None:
        return None
    wanted, question = lane_of(loaded), question_of(loaded, shape, hardware)
    found = [told for path in cache.measurements(sha256_of(question)) if (told := _read(path)) is not None]
    fitting = [told for told in found if told.question == question]
    return min(fitting, key=lambda told: _distance(told.lane, wanted), default=None)


def _read(path: Path) -> Measurement | None:
    try:
        return Measurement.from_json(read_json(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _distance(one: Lane, other: Lane) -> float:
    return abs(math.log(one.tokens / other.tokens)) + abs(math.log(one.length / other.length))
