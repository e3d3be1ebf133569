"""Ray Train without the processes that a body has no use for.

Ray's own trainer starts an actor for its controller, so that training outlives a driver whose client disconnects; a detached
actor that frees the placement group should the controller die; one for Ray datasets; one that asks an autoscaler for room; one
through which workers meet when they report to it.
Our driver, its omega and the body's placement group live and die together, whatever kills them, and Ray frees what belongs to
a job that ended. So the controller runs in the driver's body thread, and the rest is left out: a body costs its workers.
What happens to a worker group (polling, restarts, failures, shutdown) is Ray's code as it is.

This file leans on how Ray 2.60 is built inside, which is why `pyproject.toml` pins it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, state, worker_group
from ray.train.v2.api.result import Result
from ray.train.v2.torch.torch_trainer import TorchTrainer

from chrysalis_ray.body.environment import ENVIRONMENT
from chrysalis_ray.body.process import BodyWorker
from chrysalis_ray.core.errors import BodyError

# of the module, not of a moment
RAYS_OWN, RAYS_END = worker_group.SynchronizationActor, state._shutdown_sync_actor
NOT_NEEDED = (PlacementGroupCleanerCallback, DatasetsCallback)


class Nobody:
    """Stands where Ray Train has an actor through which workers meet when they report. Ours report to omega."""

    @classmethod
    def options(cls, **_: Any) -> type[Nobody]:
        return cls

    @classmethod
    def remote(cls, **_: Any) -> Nobody:
        return cls()


def end_meeting(actor: Any) -> None:
    """End the actor through which the workers of a group met, where there is one."""
    if not isinstance(actor, Nobody):
        RAYS_END(actor)


state._shutdown_sync_actor = end_meeting  # type: ignore[assignment]


class BodyTrainer(TorchTrainer):
    """Ray's TorchTrainer with its controller in the thread that calls `fit`.

    With `autoscaling` the controller asks the cluster's autoscaler for room, as Ray's own does; a cluster that starts and
    ends with the driver has none.
    """

    def __init__(self, *arguments: Any, autoscaling: bool, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.autoscaling = autoscaling
        self.abandoned = threading.Event()  # set by a driver that is about to leave Ray
        self.failed: Callable[[BaseException], None] = lambda error: None  # hears what ends a life of the workers

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, NOT_NEEDED)]

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        if not self.autoscaling:
            parts["scaling_policy"] = FixedSize(parts["scaling_policy"].scaling_config)
        controller = ControllerInDriver(**parts)
        controller.abandoned, controller.failed = self.abandoned, self.failed
        asyncio.run(controller.run())
        return controller.get_result()


class FixedSize(FixedScalingPolicy):
    """As many workers as were asked for, and nobody is asked to add nodes."""

    def _send_resource_request(self) -> None:
        """There is no autoscaler."""

    _maybe_send_resource_request = _send_resource_request
    _cancel_resource_request = _send_resource_request


class WorkersOfDriver(WorkerGroup):
    """A worker group whose controller is no actor that its workers could call; nor do they exchange anything through Ray."""

    _worker_cls = BodyWorker

    def _start_impl(self, *arguments: Any, **settings: Any) -> None:
        worker_group.SynchronizationActor = Nobody  # type: ignore[misc, assignment]
        try:  # not `instead`: bodies start side by side
            super()._start_impl(*arguments, **settings)
        finally:
            worker_group.SynchronizationActor = RAYS_OWN  # type: ignore[misc]

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=None,  # only ray.train.report asks it, and the like
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,  # only ray.train.get_all_reported_checkpoints asks it; seeds go to the store
                    **{name: values[rank] for name, values in train_context_args.items()},
                )
                for rank, worker in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        """What the user set for Ray Train goes with the workers. What we set is for the controller, which is here, and a worker
        with variables of its own would start twice: Ray starts a process that reads them and becomes the worker."""
        runtime_env = dict(WorkerGroup._get_worker_runtime_env(custom_runtime_env))
        own = {name: value for name, value in runtime_env.pop("env_vars").items() if ENVIRONMENT.get(name) != value}
        return {**runtime_env, "env_vars": own} if own else runtime_env


class ControllerInDriver(TrainController):
    """Ray's controller as a plain object; it ends when the driver leaves Ray, as the actor would."""

    worker_group_cls = WorkersOfDriver
    abandoned: threading.Event
    failed: Callable[[BaseException], None]

    def _execute_failure_decision(self, failure_decision: Any, training_failed_error: Any, *how: Any, **named: Any) -> Any:
        self.failed(training_failed_error)
        return super()._execute_failure_decision(failure_decision, training_failed_error, *how, **named)

    async def _run_control_loop_iteration(self) -> None:
        if self.abandoned.is_set() or not ray.is_initialized():  # a failed call would be retried, or start another Ray
            raise BodyError("the driver left while the body lived")
        await super()._run_control_loop_iteration()
