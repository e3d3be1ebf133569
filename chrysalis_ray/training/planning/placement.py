"""Where bodies stand, where that was left open: how many, of how many workers, sharded, offloaded, recomputing. No torch.

Every stand that this machine has room for is timed by the law of `pace.py`. Of those within a tenth of the fastest the
plainest is taken: the fewest GPUs, then the fewest workers that must wait for one another, then neither sharding nor
recomputing. What memory does not allow is not timed at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from chrysalis_ray.config.blueprint import BodyPatch
from chrysalis_ray.config.population_checks import rows_at_once
from chrysalis_ray.config.resolve import BODY_FLOOR, LoadedExperiment
from chrysalis_ray.core.layout import CacheLayout
from chrysalis_ray.training.planning.duration import bodies_of, steps_of, time_of, turns_of
from chrysalis_ray.training.planning.footprint import USABLE, admit, worker_memory
from chrysalis_ray.training.planning.hardware import Hardware
from chrysalis_ray.training.planning.measured import Measurement, find_measurement
from chrysalis_ray.training.planning.plan import Memory, gib
from chrysalis_ray.training.planning.shapes import ModelShape
from chrysalis_ray.training.planning.slots import WORTHWHILE, pace_of, settle


@dataclass(frozen=True)
class Stand:
    """One way to stand: the experiment with a number for everything, what a worker needs, and how long it would take."""

    loaded: LoadedExperiment
    slots: int
    memory: Memory
    obstacles: tuple[str, ...]
    seconds: float

    @property
    def body(self) -> BodyPatch:
        return self.loaded.body

    @property
    def devices(self) -> int:
        return (self.body.count or 1) * (self.body.workers or 1)

    @property
    def fits(self) -> bool:
        return not self.obstacles

    @property
    def plainness(self) -> tuple[int, int, int, bool, bool]:
        body = self.body
        return self.devices, body.workers or 1, body.zero_stage or 0, body.offload == "cpu", bool(body.activation_checkpointing)

    @property
    def words(self) -> str:
        count, workers = self.body.count or 1, self.body.workers or 1
        return f"{_many(count, 'body', 'bodies')} of {_many(workers, 'worker', 'workers')}"


def place(
    loaded: LoadedExperiment, hardware: Hardware, shape: ModelShape | None, cache: CacheLayout | None
) -> tuple[LoadedExperiment, list[str]]:
    """`loaded` with a number where its body says `auto` (its slots aside), and the reasons. A written number stands."""
    if not loaded.open:
        return loaded, []
    on_gpu = (loaded.body.gpus_per_worker or 0) > 0
    if shape is None or (on_gpu and not hardware.gpus):
        lack = "the sizes of the base are not known yet" if shape is None else "there is no GPU here to plan for"
        careful = {name: getattr(BODY_FLOOR, name) for name in loaded.open} | (
            {"activation_checkpointing": True} if on_gpu and "activation_checkpointing" in loaded.open else {}
        )
        told = ", ".join(f"{name} {_shown(value)}" for name, value in careful.items())
        return loaded.with_body(**careful), [f"body: auto means {told}: {lack}"]
    stands = _stands(loaded, hardware, shape, cache)
    chosen = _best(stands)
    return chosen.loaded, [
        *_placement_reason(loaded, chosen, stands, hardware),
        *_memory_reasons(loaded, chosen, stands, hardware),
    ]


def _best(stands: Sequence[Stand]) -> Stand:
    """The plainest of the fast ones that fit; where none fits, the one that needs the least."""
    fitting = [stand for stand in stands if stand.fits]
    if not fitting:
        return min(stands, key=lambda stand: (stand.memory.total, stand.memory.host, stand.plainness))
    least = min(stand.seconds for stand in fitting)
    return min((stand for stand in fitting if stand.seconds <= WORTHWHILE * least), key=lambda stand: stand.plainness)


# what there is to choose from -----------------------------------------------------------------------------------------


def _stands(loaded: LoadedExperiment, hardware: Hardware, shape: ModelShape, cache: CacheLayout | None) -> list[Stand]:
    ways = [loaded.with_body(**fields) for fields in _ways(loaded, hardware)]
    # A measurement tells of one kind of body: it decides between kinds only where each of them was measured.
    measured = [find_measurement(way, shape, hardware, cache) for way in ways]
    if any(told is None for told in measured):
        measured = [None] * len(ways)
    return [_stand(way, hardware, shape, told) for way, told in zip(ways, measured, strict=True)]


def _stand(loaded: LoadedExperiment, hardware: Hardware, shape: ModelShape, measured: Measurement | None) -> Stand:
    population, bodies = loaded.experiment.population, bodies_of(loaded)
    loaded, choice = settle(loaded, hardware, shape, measured)
    slots = min(choice.slots, math.ceil(population.variants / bodies))
    memory = worker_memory(shape, loaded, slots, measured)
    _, obstacles = admit(loaded.body, memory, hardware, bodies)
    steps, chunk = steps_of(loaded)
    turns = turns_of(loaded, pace_of(loaded, hardware, shape, measured), slots, chunk)
    time = time_of(loaded, hardware, turns, steps // chunk, measured, "")
    return Stand(loaded, slots, memory, tuple(obstacles), time.train_expected + time.judge)


def _ways(loaded: LoadedExperiment, hardware: Hardware) -> Iterator[dict[str, Any]]:
    """Every choice of the open fields that makes sense."""
    devices = _devices(loaded.body, hardware)
    for workers in _worker_counts(loaded, devices):
        for count, zero, offload, again in itertools.product(
            _body_counts(loaded, devices // workers),
            (0, 3) if "zero_stage" in loaded.open else (loaded.body.zero_stage,),
            ("none", "cpu") if "offload" in loaded.open else (loaded.body.offload,),
            (False, True) if "activation_checkpointing" in loaded.open else (loaded.body.activation_checkpointing,),
        ):
            way = {
                "count": count,
                "workers": workers,
                "zero_stage": zero,
                "offload": offload,
                "activation_checkpointing": again,
            }
            if _makes_sense(loaded, way):
                yield {name: way[name] for name in loaded.open}


def _makes_sense(loaded: LoadedExperiment, way: dict[str, Any]) -> bool:
    """Whether what is open fits together; what was written by hand was checked when it was read."""
    sharded, offloaded, on_gpu = way["zero_stage"] == 3, way["offload"] == "cpu", (loaded.body.gpus_per_worker or 0) > 0
    if "zero_stage" in loaded.open and sharded and loaded.body.quantization != "none":
        return False
    if {"zero_stage", "workers"} & set(loaded.open) and sharded and way["workers"] == 1 and not offloaded:
        return False
    return not offloaded or (sharded and on_gpu)


def _devices(body: BodyPatch, hardware: Hardware) -> int:
    """Workers that find their GPU, or their cores, on this machine."""
    gpus, cpus = body.gpus_per_worker or 0.0, body.cpus_per_worker or 1.0
    by_cores = int(hardware.cpus / cpus)
    return max(min(by_cores, int(hardware.gpus / gpus)) if gpus > 0 else by_cores, 1)


def _worker_counts(loaded: LoadedExperiment, devices: int) -> list[int]:
    """Workers of one body: those that share the rows of a micro-step evenly. On CPUs one: threads do what workers would."""
    body, rows = loaded.body, rows_at_once(loaded)
    if "workers" not in loaded.open:
        return [body.workers or 1]
    if not (body.gpus_per_worker or 0) >= 1:
        return [1]
    shared = math.gcd(rows, body.virtual_workers) if body.virtual_workers else rows
    return [count for count in range(1, devices + 1) if shared % count == 0]


def _body_counts(loaded: LoadedExperiment, room: int) -> list[int]:
    """1, 2, 4 ... and as many bodies as there are devices or variants for; fewer where a searcher learns."""
    if "count" not in loaded.open:
        return [loaded.body.count or 1]
    population, slots = loaded.experiment.population, loaded.body.slots
    places = max(population.variants // 4, 1) if population.proposes else population.variants
    most = max(min(room, places // slots if population.proposes and isinstance(slots, int) else places), 1)
    return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]


# words --------------------------------------------------------------------------------------------------------------


def _placement_reason(loaded: LoadedExperiment, chosen: Stand, stands: Sequence[Stand], hardware: Hardware) -> list[str]:
    named = [f"body.{name}" for name in ("count", "workers") if name in loaded.open]
    if not named:
        return []
    devices = _devices(loaded.body, hardware)
    on_gpu = (loaded.body.gpus_per_worker or 0) > 0
    there = _many(devices, "GPU", "GPUs") if on_gpu else f"{_many(devices, 'worker', 'workers')} that the cores allow"
    parts = [f"{chosen.words}, on {chosen.devices} of {there}"]
    if not chosen.fits:
        parts.append("nothing has room here, and this needs the least")
    elif chosen.devices == 1:
        wider = [stand for stand in stands if stand.devices > 1]
        more = "more would save less than a tenth of the time" if any(map(_fits, wider)) else "more have no room"
        parts.append(more if wider else "there is no other")
    else:
        parts += _comparisons(chosen, stands)
    return [f"{' and '.join(named)}: auto: {'; '.join(parts)}"]


def _comparisons(chosen: Stand, stands: Sequence[Stand]) -> list[str]:
    """How the chosen stand compares with one worker, and with all devices in one body or each a body."""
    parts = []
    alone = _quickest([stand for stand in stands if stand.devices == 1])
    if alone is None:
        parts.append("one worker alone has no room for it")
    else:
        parts.append(f"{alone.seconds / chosen.seconds:.1f} times as fast as {alone.words}")
    widest, most = max(stand.body.workers or 1 for stand in stands), max(stand.body.count or 1 for stand in stands)
    for other in (
        _quickest([stand for stand in stands if (stand.body.workers, stand.body.count) == (widest, 1)]),
        _quickest([stand for stand in stands if (stand.body.workers, stand.body.count) == (1, most)]),
    ):
        if other is not None and other.devices > 1 and other.words != chosen.words:
            parts.append(f"{other.words} would take {other.seconds / chosen.seconds:.2f} times as long")
    return parts


def _fits(stand: Stand) -> bool:
    return stand.fits


def _quickest(stands: Sequence[Stand]) -> Stand | None:
    return min(filter(_fits, stands), key=lambda stand: stand.seconds, default=None)


def _memory_reasons(loaded: LoadedExperiment, chosen: Stand, stands: Sequence[Stand], hardware: Hardware) -> list[str]:
    """Why the base is sharded, offloaded or recomputed, or why not: by what a worker would need otherwise."""
    room, reasons = _room(chosen.body, hardware), []
    for name, plain in (("zero_stage", 0), ("offload", "none"), ("activation_checkpointing", False)):
        value = getattr(chosen.body, name)
        if name not in loaded.open or (name == "offload" and chosen.body.zero_stage != 3):
            continue
        if value == plain:
            reasons.append(f"body.{name}: auto means {_shown(value)}: a worker needs {gib(chosen.memory.total)} of {gib(room)}")
            continue
        without = [stand for stand in stands if getattr(stand.body, name) == plain and stand.devices == chosen.devices]
        quickest = _quickest(without)
        if quickest is not None:
            why = f"{quickest.seconds / chosen.seconds:.1f} times as fast as {_shown(plain)}, since more variants have room"
        elif without:
            why = f"with {_shown(plain)} a worker would need {gib(min(s.memory.total for s in without))} or more of {gib(room)}"
        else:
            why = "nothing else is possible with what was written"
        reasons.append(f"body.{name}: auto means {_shown(value)}: {why}")
    return reasons


def _room(body: BodyPatch, hardware: Hardware) -> float:
    """Bytes that a worker may use."""
    gpus = body.gpus_per_worker or 0.0
    if gpus > 0:
        return hardware.gpu_memory * USABLE * min(gpus, 1.0)
    return hardware.memory * USABLE / ((body.workers or 1) * (body.count or 1))


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _many(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
