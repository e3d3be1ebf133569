"""How long a worker takes, as a function of what it is given: one formula, its numbers guessed or measured. No torch.

    step    = (microsteps x once + per_variant x part) x crowd
    once    = passes x launch + work            "sum"
            | max(passes x launch, work)        "roofline"
    work    = part x lane x (per_token + per_token_length x length)
    passes  = as many as `part` variants of `lane` tokens make (`passes.py`)

`lane` are the tokens that one variant brings to a micro-step on this worker, `length` those of a row. `part` are the variants
that one thread computes: all of them on a GPU, their share where a CPU worker splits them over shards. `launch` is what does
not grow with tokens: dispatch, reading the weights, gathering a sharded base. Seconds everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from chrysalis_ray.config.blueprint import BodyPatch
from chrysalis_ray.training.passes import passes_of, threads_of, variants_per_pass
from chrysalis_ray.training.planning.hardware import Hardware
from chrysalis_ray.training.planning.shapes import ModelShape

# Effective FLOP/s of small fp32 matrix products per CPU thread, and seconds per layer and micro-step lost on dispatch.
CPU_FLOPS_PER_THREAD, CPU_LAYER_SECONDS = 25e9, 2e-3
# Share of a GPU's dense bf16 peak that LoRA training reaches, and the launch floor: 6,400 operations of 28 layers in 40 ms.
GPU_EFFICIENCY, GPU_LAYER_SECONDS = 0.45, 0.040 / 28
# Memory-bound operations: 2.6 us per token for 28 layers of width 1,024 on an H100.
GPU_SECONDS_PER_ELEMENT = 2.6e-6 / (28 * 1024)
# Dense bf16 peaks in FLOP/s, from the makers' data sheets.
GPU_PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10": 125e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "T4": 65e12, "V100": 125e12,
}  # fmt: skip
UNKNOWN_GPU_PEAK = 100e12
# What ZeRO-3 gathers with, in bytes per second and worker: NVLink inside a node, InfiniBand between nodes, gloo on CPUs.
LINK_NVLINK, LINK_BETWEEN_NODES, LINK_GLOO, GPUS_PER_NODE = 200e9, 40e9, 1e9, 8
# What an offloaded shard comes back with: half of what PCIe 4.0 x16 could.
LINK_HOST = 16e9
# To take a seed out of its slot, pack it and put it into the store: a fixed cost, and a rate in bytes per second.
KEEP_SECONDS, KEEP_BYTES = 0.02, 100e6


@dataclass(frozen=True)
class Pace:
    """The numbers of the formula above; and what a report costs: scoring a token, keeping a variant's seed."""

    kind: Literal["sum", "roofline"]
    launch: float
    per_token: float
    per_token_length: float = 0.0
    per_variant: float = 0.0
    score_per_token: float = 0.0
    keep: float = 0.0
    shards: int = 1
    crowding: float = 1.0  # how much longer a step takes when all shards work than when one does
    shares: bool = False  # whether shards that have no variant compute rows of another's
    tokens_per_pass: int | None = None  # of several variants, what one pass may hold

    def step(self, variants: float, lane: float, length: int, microsteps: int = 1) -> float:
        """One optimizer step of so many variants together."""
        part, partners = self.part(variants), self.partners(variants, lane, length)
        work = part * lane / partners * (self.per_token + self.per_token_length * length)
        launch = self.passes(variants, lane, length) * self.launch
        once = launch + work if self.kind == "sum" else max(launch, work)
        return (microsteps * once + self.per_variant * part) * self.crowd(variants * partners)

    def score(self, variants: float, tokens: float) -> float:
        """Held-out losses of so many variants on the same `tokens` tokens."""
        return self.part(variants) * tokens * self.score_per_token * self.crowd(variants)

    def ridge(self, length: int) -> int:
        """Tokens in one pass whose work takes as long as the launch: far below it a pack is nearly free."""
        per_token = self.per_token + self.per_token_length * length
        return max(round(self.launch / per_token), 1) if per_token else 1

    def gain(self, variants: int, lane: float, length: int, microsteps: int = 1) -> float:
        """How many times faster a pack of `variants` steps than one variant after the other."""
        return variants * self.step(1, lane, length, microsteps) / self.step(variants, lane, length, microsteps)

    def part(self, variants: float) -> int:
        """Variants that the busiest thread computes."""
        return math.ceil(variants / self._live(variants))

    def passes(self, variants: float, lane: float, length: int) -> int:
        """Passes in which the busiest thread computes its variants."""
        part, own = self.part(variants), lane / self.partners(variants, lane, length)
        return len(passes_of(part, variants_per_pass(part, own, self.tokens_per_pass)))

    def partners(self, variants: float, lane: float, length: int) -> int:
        """Shards that compute the rows of each variant (`partners.py`)."""
        return max(1, min(self.shards // self._live(variants), int(lane // length))) if self.shares else 1

    def crowd(self, variants: float) -> float:
        """How many times as long a step takes because other shards compute beside it."""
        return 1.0 if self.shards == 1 else 1.0 + (self.crowding - 1.0) * (self._live(variants) - 1) / (self.shards - 1)

    def _live(self, variants: float) -> int:
        return min(self.shards, max(math.floor(variants), 1))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Pace:
        return cls(**{field.name: value[field.name] for field in fields(cls) if field.name in value})


def guess_pace(shape: ModelShape, body: BodyPatch, hardware: Hardware, adapter: int, length: int, slot_bytes: int) -> Pace:
    """A pace from the sizes of the base and of one adapter (`adapter` parameters) and from what such devices reach."""
    flops = shape.training_flops(adapter, length)
    if body.activation_checkpointing:
        flops += shape.forward_flops(length)
    gathering = gather_seconds(shape, body)
    if (body.gpus_per_worker or 0) > 0:
        peak = gpu_peak(hardware)
        share = min(body.gpus_per_worker or 1.0, 1.0)
        speed = peak * GPU_EFFICIENCY * share * (1.0 if body.precision == "bf16" else 0.5)
        launch = max(GPU_LAYER_SECONDS * shape.layers, gathering)
        beside = GPU_SECONDS_PER_ELEMENT * shape.layers * shape.hidden * GPU_PEAKS["H100"] / peak
    else:
        processes = (body.workers or 1) * (body.count or 1)
        speed = CPU_FLOPS_PER_THREAD * max(min(threads_of(body), hardware.cpus / processes), 1)
        # A step takes at least as long as reading the base from memory, worth about 30 tokens of computing, or the dispatch.
        reading = 30 * shape.forward_flops(1) * 2 / speed
        launch, beside = max(reading, CPU_LAYER_SECONDS * shape.layers, gathering), 0.0
    return Pace(
        kind="roofline",
        launch=launch,
        per_token=flops / speed + beside,
        per_variant=reduce_seconds(body, adapter),
        score_per_token=shape.forward_flops(length) / speed,
        keep=KEEP_SECONDS + slot_bytes / KEEP_BYTES,
    )


def gpu_peak(hardware: Hardware) -> float:
    """Dense bf16 peak of the GPUs in FLOP/s; an H100's where there are none, a modest one's where the name is unknown."""
    if not hardware.gpus:
        return GPU_PEAKS["H100"]
    return next((peak for name, peak in GPU_PEAKS.items() if name in hardware.gpu_name), UNKNOWN_GPU_PEAK)


def gather_seconds(shape: ModelShape, body: BodyPatch) -> float:
    """Seconds per micro-step in which ZeRO-3 gathers the base: forward, backward, and once more where activations are redone.

    The same for any number of variants: packing N of them divides it by N.
    """
    workers = body.workers or 1
    if body.zero_stage != 3:
        return 0.0
    times, width = 3 if body.activation_checkpointing else 2, 2 if body.precision == "bf16" else 4
    if body.offload == "cpu":  # every shard comes from main memory first
        return times * shape.parameters * width * (1 / workers / LINK_HOST + (1 - 1 / workers) / _link(body))
    return times * shape.parameters * width * (1 - 1 / workers) / _link(body)


def reduce_seconds(body: BodyPatch, adapter: int) -> float:
    """Seconds per optimizer step and variant in which workers sum its gradients (a ring: each byte but its own part twice)."""
    workers = body.workers or 1
    return 2 * (1 - 1 / workers) * 4 * adapter / _link(body)


def _link(body: BodyPatch) -> float:
    """Bytes per second between the workers of a body."""
    if not (body.gpus_per_worker or 0) > 0:
        return LINK_GLOO
    return LINK_NVLINK if (body.workers or 1) <= GPUS_PER_NODE else LINK_BETWEEN_NODES


def assumption_of(body: BodyPatch, hardware: Hardware) -> str:
    """What `guess_pace` assumed, in words."""
    if not (body.gpus_per_worker or 0):
        return f"{CPU_FLOPS_PER_THREAD / 1e9:.0f} GFLOP/s per CPU thread"
    which = hardware.gpu_name if hardware.gpus else "an H100 (there is no GPU here)"
    return f"{GPU_EFFICIENCY:.0%} of {gpu_peak(hardware) / 1e12:.0f} TFLOP/s of {which or 'an unknown GPU'}"
