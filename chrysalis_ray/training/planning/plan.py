"""A plan as a record, and in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from chrysalis_ray.config.blueprint import BodyPatch
from chrysalis_ray.training.planning.hardware import GIB, Hardware


@dataclass(frozen=True)
class Memory:
    """Bytes on one worker's device while all slots train, by component; `host` is what the worker needs beside its GPU.
    `judging` stands in the place of activations and logits when training is over, on a CPU.

    A measurement does not tell logits from activations: `logits` is 0 then.
    """

    base: int
    bank: int
    activations: int
    logits: int
    process: int
    host: int
    judging: int = 0

    @property
    def total(self) -> int:
        return self.base + self.bank + max(self.activations + self.logits, self.judging) + self.process


@dataclass(frozen=True)
class Time:
    """Seconds: training if the scheduler stops all it can, what it will stop, and nothing; the rest; and what packing gains
    (a pack of two, where there is no pack).

    Training includes the reports. `measured` is when this machine was measured, None for a guess by `assumption`.
    """

    train_least: float
    train_expected: float
    train_most: float
    pretrain: float
    judge: float
    overhead: float
    ridge_tokens: int
    lane_tokens: int
    packing_gain: float
    assumption: str
    measured: str | None = None

    @property
    def least(self) -> float:
        return self.train_least + self.pretrain + self.judge + self.overhead

    @property
    def expected(self) -> float:
        return self.train_expected + self.pretrain + self.judge + self.overhead

    @property
    def most(self) -> float:
        return self.train_most + self.pretrain + self.judge + self.overhead


@dataclass(frozen=True)
class Plan:
    """What would be built. `memory` and `time` are None while the sizes of the base are unknown. `chosen` says what was left
    open, what it means here, and why."""

    name: str
    base: str
    parameters: int | None
    variants: int
    steps: int
    chunk_steps: int
    reports: int
    tokens_per_variant: int
    tokens: int
    domains: tuple[str, ...]
    rank: int
    lora_parameters: int | None
    body: BodyPatch
    slots_used: int
    bodies: int
    bodies_at_once: int
    hardware: Hardware
    memory: Memory | None
    time: Time | None
    measured: str | None
    obstacles: tuple[str, ...]
    chosen: tuple[str, ...]
    notes: tuple[str, ...]
    adapter: str = "lora"  # of which kind, in peft's word

    @property
    def fits(self) -> bool:
        return not self.obstacles

    @property
    def exit_code(self) -> int:
        """0 if it fits, 3 if it does not."""
        return 0 if self.fits else 3

    def to_json(self) -> dict[str, Any]:
        plain = {key: value for key, value in self.__dict__.items() if key not in ("body", "hardware", "memory", "time")}
        return {
            **{key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()},
            "body": self.body.model_dump(mode="json"),
            "hardware": self.hardware.to_json(),
            "memory": {**asdict(self.memory), "total": self.memory.total} if self.memory else None,
            "time": _time_json(self.time) if self.time else None,
            "fits": self.fits,
        }

    def lines(self) -> list[str]:
        """The plan for people, one fact per line."""
        return [
            f"{self.name}: {self.variants} variants of {self.base}{_millions(self.parameters)}",
            f"each: {self.steps} optimizer steps in {self.reports} reports of {self.chunk_steps}, "
            f"{self.tokens_per_variant:,} tokens, {_adapter_words(self)}{_millions(self.lora_parameters)}",
            f"together: {self.tokens:,} tokens over {len(self.domains)} domains ({', '.join(self.domains)})",
            _body_line(self),
            f"machine: {self.hardware.line()}",
            *(_memory_lines(self.memory, self.body, self.measured) if self.memory else ()),
            *(_time_lines(self.time) if self.time else ()),
            *(f"chosen: {reason}" for reason in self.chosen),
            *(f"note: {note}" for note in self.notes),
            *(f"does not fit: {obstacle}" for obstacle in self.obstacles),
        ]


def _adapter_words(plan: Plan) -> str:
    ranked = f" rank {plan.rank}" if plan.adapter == "lora" or plan.rank > 1 else ""
    return f"{'LoRA' if plan.adapter == 'lora' else f'adapter {plan.adapter}'}{ranked}"


def _time_json(time: Time) -> dict[str, Any]:
    return {**asdict(time), "least": time.least, "expected": time.expected, "most": time.most}


def _body_line(plan: Plan) -> str:
    body = plan.body
    on = f"{body.gpus_per_worker:g} GPU" if body.gpus_per_worker else f"{body.cpus_per_worker:g} CPU"
    workers = "1 worker" if body.workers == 1 else f"{body.workers} workers"
    sharded = f", ZeRO-{body.zero_stage}" if body.zero_stage else ""
    places = plan.slots_used * plan.bodies
    turns = f" of {plan.variants}, which take turns," if places < plan.variants else ""
    count, each = ("1 body", "") if plan.bodies == 1 else (f"{plan.bodies} bodies at once", " each")
    where = f"in {body.slots} slots on {workers} x {on}{each}, {body.precision}{sharded}"
    return f"{count}: {min(places, plan.variants)} variants{turns} {where}"


def _memory_lines(memory: Memory, body: BodyPatch, measured: str | None) -> list[str]:
    parts: tuple[tuple[str, int], ...]
    parts = (("base", memory.base), ("adapters, gradients, moments", memory.bank), ("activations", memory.activations),
             ("logits chunk", memory.logits), ("process", memory.process))  # fmt: skip
    if memory.judging > memory.activations + memory.logits:
        parts = (*parts[:2], ("judging", memory.judging), parts[-1])
    shown = ", ".join(f"{name} {gib(size)}" for name, size in parts if size)
    beside = f"; and {gib(memory.host)} of main memory" if body.offload != "none" and memory.host else ""
    how = f"; measured on this machine, {measured}" if measured else ""
    return [f"memory per worker: {gib(memory.total)} ({shown}){beside}{how}"]


def _time_lines(time: Time) -> list[str]:
    span = (
        f"{clock(time.least)} to {clock(time.most)}, likely {clock(time.expected)}"
        if time.train_least < 0.95 * time.train_most
        else f"about {clock(time.most)}"
    )
    pretrain = f", base {clock(time.pretrain)}" if time.pretrain else ""
    guess = f"a guess, within a factor of two: {time.assumption}; --measure measures"
    how = f"measured on this machine, {time.measured}" if time.measured else guess
    return [
        f"time: {span} (training at most {clock(time.train_most)}{pretrain}, judging {clock(time.judge)}, the rest "
        f"{clock(time.overhead)}); {how}"
    ]


def _millions(count: int | None) -> str:
    if count is None:
        return ""
    return f" ({count / 1e9:.2f} billion parameters)" if count >= 1e9 else f" ({count / 1e6:.2f} million parameters)"


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / (1 << 20):.0f} MiB"


def clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
