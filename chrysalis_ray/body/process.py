"""The processes of a body: Ray Train's actors, without the modules that they import and never use."""

from __future__ import annotations

from chrysalis_ray.core.postponed import postponed

with postponed():
    from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker


class BodyWorker(RayTrainWorker):
    """A worker of a body. Ray imports this file to make one, and so the block above is what loads Ray Train there."""


class Nobody:
    """Stands where Ray Train has an actor through which workers meet when they report. Ours report to omega."""

    def __init__(self, **settings: object) -> None:
        """Whatever it is told, it has nothing to do."""
