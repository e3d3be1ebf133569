"""The processes of a body: Ray Train's actors, without the modules that they import and never use."""

from __future__ import annotations

import gc

from chrysalis_ray.core.postponed import postponed

with postponed():
    from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker


class BodyWorker(RayTrainWorker):
    """A worker of a body. Ray imports this file to make one, and so the block above is what loads Ray Train there."""

    def __init__(self, *arguments: object, **settings: object) -> None:
        gc.disable()  # torch and transformers are imported next (core/collecting.py); `worker.grow` turns it on again
        super().__init__(*arguments, **settings)
