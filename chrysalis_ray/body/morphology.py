"""The shape of a body, and the algebra of changing it.

`Morphology() >> patch` gives a new morphology; the empty patch is the identity, and patches compose from left to right. Two
signatures tell changes apart: a *structural* change needs another body, a *cosmetic* one does not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from chrysalis_ray.config.blueprint import BodyPatch
from chrysalis_ray.core.records import sha256_of

COSMETIC = ("threads", "hang_seconds")


@dataclass(frozen=True)
class Morphology:
    """Workers, what each holds, and how the base lies on them. `count` bodies of this shape stand at once."""

    count: int = 1
    workers: int = 1
    gpus_per_worker: float = 0.0
    cpus_per_worker: float = 1.0
    slots: int = 8
    zero_stage: int = 0
    offload: str = "none"
    nvme_path: str | None = None
    precision: str = "fp32"
    quantization: str = "none"
    attention: str = "sdpa"
    lanes: Literal["compacted", "fixed"] = "compacted"
    activation_checkpointing: bool = False
    compile: bool = False
    threads: int | None = None
    tokens_per_pass: int | None = None
    virtual_workers: int | None = None
    gradients: Literal["whole", "sharded"] = "whole"
    hang_seconds: float | None = None

    def __rshift__(self, patch: BodyPatch) -> Morphology:
        return replace(self, **patch.model_dump(exclude_none=True))

    def hosting(self, variants: int) -> Morphology:
        """No more bodies and slots than so many variants can fill."""
        count = min(self.count, variants)
        return replace(self, count=count, slots=min(self.slots, -(-variants // count)))

    @property
    def places(self) -> int:
        """Variants that train at once, in all bodies together."""
        return self.count * self.slots

    @property
    def sentence(self) -> str:
        bodies = "" if self.count == 1 else f"{self.count} bodies, each of "
        return f"{bodies}{self.workers} worker(s), {self.slots} slots, ZeRO stage {self.zero_stage}, {self.precision}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Morphology:
        return cls(**{f.name: value[f.name] for f in fields(cls) if f.name in value})

    @property
    def structural_signature(self) -> str:
        return sha256_of({key: value for key, value in self.to_json().items() if key not in COSMETIC})[:16]

    @property
    def cosmetic_signature(self) -> str:
        return sha256_of({key: self.to_json()[key] for key in COSMETIC})[:16]
