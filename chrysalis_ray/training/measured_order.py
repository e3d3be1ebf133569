"""What a process that measures a body is told to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from chrysalis_ray.training.planning.measured import Lane


@dataclass(frozen=True)
class Order:
    """What to measure, as `measure.py` writes it. `room` is the memory this process may use beyond its imports, in bytes."""

    base: dict[str, Any]
    worn: dict[str, Any]  # the blueprint's lora, or its adapter
    rank: int
    optimizer: str
    vocabulary: int
    slots: int
    rows: int
    length: int
    microsteps: int
    tokens_per_pass: int | None
    precision: str
    threads: int
    workers: int
    zero_stage: int
    offload: str
    nvme_path: str | None
    gradients: Literal["whole", "sharded"]
    compile: bool
    activation_checkpointing: bool
    on_gpu: bool
    began: float
    room: int | None
    look: float  # about how many seconds to look at each load
    folder: str

    @property
    def lane(self) -> Lane:
        return Lane(self.rows, self.length)
