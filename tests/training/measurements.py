"""Records of measurements that nobody took, for tests of what is made of them."""

from __future__ import annotations

from dataclasses import replace

from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.training.planning.hardware import GIB, Hardware
from chrysalis_ray.training.planning.measured import Holding, Lane, Measurement, Point, question_of
from chrysalis_ray.training.planning.pace import Pace
from chrysalis_ray.training.planning.shapes import shape_of

LAPTOP = Hardware(cpus=2, memory=16 * GIB, processor="Test")


def measurement(loaded: LoadedExperiment, hardware: Hardware = LAPTOP, **changes: object) -> Measurement:
    """A record for `loaded` on that machine, as if somebody had measured."""
    shape = shape_of(loaded.base)
    assert shape is not None
    told = Measurement(
        question=question_of(loaded, shape, hardware),
        lane=Lane(2, 64),
        asked=8,
        slots=8,
        pace=Pace(
            "sum", launch=0.01, per_token=1e-4, per_variant=1e-4, score_per_token=3e-5, keep=0.01, shards=2, crowding=1.5
        ),
        residual=0.01,
        rejected=0.1,
        holding=Holding(process=400 << 20, base=50 << 20, per_slot=1_523_712, per_token=1e5),
        start=3.0,
        gather=0.0,
        pretrain=1e-4,
        points=(Point(1, 2, 64, 1, 0.02, 500 << 20),),
        date="2026-11-28",
    )
    return replace(told, **changes)  # type: ignore[arg-type]
