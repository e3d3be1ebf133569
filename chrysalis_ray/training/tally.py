"""What goes into the training of a shard, and what is counted on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from chrysalis_ray.training.pack import Occupant


class Seat(NamedTuple):
    """Who sits in a row of a shard, and how many optimizer steps it is to make."""

    occupant: Occupant
    steps: int


@dataclass
class Tally:
    """The losses of a variant, summed in nats, their number, and the gradient norm of its last step."""

    loss: float = 0.0
    labels: int = 0
    norm: float = 0.0

    def add(self, later: Tally) -> None:
        """Go on with what came later."""
        self.loss, self.labels, self.norm = self.loss + later.loss, self.labels + later.labels, later.norm

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Tally:
        return cls(**value)
