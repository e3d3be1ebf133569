"""What Tune's controller is told of trials, and what runs in their processes instead.

Tune wants a class of its own, starts every trial in a process with variables of its own, for which Ray imports itself twice,
and sends along objects that cannot be read without importing all of Tune. A `VariantTrial` needs none of it. Schedulers,
searchers and the controller are Ray's code as it is.

This file leans on how Ray 2.60 is built inside, which is why `pyproject.toml` pins it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import tune
from ray.air._internal import usage
from ray.tune.execution import tune_controller
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.experiment.trial import StorageContext, _TrialInfo
from ray.util import deregister_serializer, register_serializer

from chrysalis_ray.core.instead import instead
from chrysalis_ray.population.trial import Storage, VariantTrial


class Trial(tune.Trainable):
    """Stands for `VariantTrial` where Tune's controller looks at a class."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        return PlacementGroupFactory([{"memory": config["memory"]}])


class LightActors:
    """In the place of Tune's cache of actor classes: every trial is a `VariantTrial`, in a process as Ray starts it."""

    def __init__(self) -> None:
        self.actor = ray.remote(VariantTrial)

    def get(self, trainable: type) -> Any:
        assert trainable is Trial, f"Tune was given {trainable}"
        return self.actor


@contextmanager
def light_trials() -> Iterator[None]:
    """Inside this block a tune run over `Trial` runs `VariantTrial`s."""
    register_serializer(_TrialInfo, serializer=lambda info: info.trial_id, deserializer=str)
    register_serializer(StorageContext, serializer=told, deserializer=Storage._make)
    try:
        with (
            instead(tune_controller, "_ActorClassCache", LightActors),
            instead(tune_controller.TuneController, "_maybe_buffer_training", unbuffered),
            instead(usage, "tag_callbacks", uncounted),
        ):
            yield
    finally:
        deregister_serializer(StorageContext)
        deregister_serializer(_TrialInfo)


def told(storage: StorageContext) -> tuple[Any, ...]:
    """What a trial's process hears of where Tune keeps its checkpoints: the run directory, which all nodes share."""
    assert not storage.custom_fs_provided
    return storage.storage_fs_path, storage.experiment_dir_name, storage.trial_dir_name, storage.current_checkpoint_index


def unbuffered(controller: Any, trial: Any) -> tuple[int, float]:
    """How many reports, and seconds of them, Tune hears at once: one, whatever TUNE_RESULT_BUFFER_LENGTH says. Omega answers
    the next step of a variant only when the others have asked, too."""
    return 1, 0.0


def uncounted(callbacks: Any) -> bool:
    """Ray counts callbacks by class, for which it imports W&B and what else it has callbacks for."""
    return False
