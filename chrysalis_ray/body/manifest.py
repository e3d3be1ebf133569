"""Manifesting a body: omega, and a Ray Train worker group in a thread of the driver."""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chrysalis_ray.body.barrier import Barrier
from chrysalis_ray.body.cluster import PATIENCE_SECONDS, check_room, joined
from chrysalis_ray.body.omega import LINGER_SECONDS, Omega
from chrysalis_ray.body.order import AnswerOrder
from chrysalis_ray.body.turn import Candidate, Questions, Replies, Scores
from chrysalis_ray.body.worker import BodyPlan, live
from chrysalis_ray.config.population import Asha, MedianStopping, Pb2, Pbt, Population
from chrysalis_ray.core.errors import BodyError, ChrysalisError, error_line
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import Variant

log = logging.getLogger(__name__)

ERRORS = "errors.log"  # in the folder of a body: what ended its lives


def namespace() -> str:
    """The Ray namespace of this driver, where its workers find omega."""
    import ray

    return ray.get_runtime_context().namespace


def order_for(population: Population) -> AnswerOrder:
    """The order of answers that suits the scheduler of a population."""
    scheduler = population.scheduler
    if isinstance(scheduler, Asha):
        return AnswerOrder("halving", scheduler.reduction_factor)
    if isinstance(scheduler, MedianStopping):
        return AnswerOrder("median", grace_reports=scheduler.grace_reports, min_variants=scheduler.min_variants)
    return AnswerOrder("best_first" if isinstance(scheduler, Pbt | Pb2) else "by_variant")


def awaken_omega(
    name: str,
    store: Path,
    weave: Path,
    variants: Sequence[Variant],
    slots: int,
    linger_seconds: float = LINGER_SECONDS,
    barrier: Barrier | None = None,
    bodies: int = 1,
    run_ahead: bool = False,
    order: AnswerOrder | None = None,
    hang_seconds: float | None = None,
) -> Any:
    """Start the omega actor on this node, so that it lives and dies with the driver. Returns its handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here, "max_concurrency": 10_000, "name": name}
    arguments = (str(store), str(weave), list(variants), slots, linger_seconds, barrier, bodies, run_ahead, order, hang_seconds)
    omega: Any = ray.remote(Omega).options(**options).remote(*arguments)
    started = omega.start.remote()
    importlib.import_module("chrysalis_ray.body.trainer")  # Ray Train and torch: that takes as long as a process to come up
    ray.get(started)
    return omega


class Body:
    """A worker group and the thread that watches over it.

    `autoscaling` says that the cluster may add nodes when it is asked for room.
    """

    def __init__(self, plan: BodyPlan, omega: Any, folder: Path, *, autoscaling: bool, max_failures: int = -1) -> None:
        self.plan = plan
        self.omega = omega
        self.folder = folder
        self.autoscaling = autoscaling
        self.max_failures = max_failures
        self.error: BaseException | None = None
        self.failures: list[str] = []  # what ended its lives, a line each
        self.trainer: Any = None
        self.thread: threading.Thread | None = None

    def prepare(self) -> None:
        """What must not happen in the thread: two threads importing Ray's parts at once trip over each other."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.trainer = self._trainer()
        self.trainer.failed = self._note

    def start(self) -> None:
        """Start the workers; returns at once."""
        self.thread = threading.Thread(target=self._watch, name=f"body-{self.plan.number}", daemon=True)
        self.thread.start()

    def _trainer(self) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig

        from chrysalis_ray.body.trainer import BodyTrainer

        shape = self.plan.morphology
        resources = {"CPU": shape.cpus_per_worker}
        if shape.gpus_per_worker > 0:
            resources["GPU"] = shape.gpus_per_worker
        number = self.plan.number
        life = len(list(self.folder.glob(f"body-{number:02d}-life-*")))
        return BodyTrainer(
            live,
            autoscaling=self.autoscaling,
            train_loop_config={"plan": self.plan},
            torch_config=TorchConfig(backend="nccl" if shape.gpus_per_worker > 0 else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=shape.workers, use_gpu=shape.gpus_per_worker > 0, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=f"body-{number:02d}-life-{life:03d}",
                storage_path=str(self.folder),
                failure_config=FailureConfig(max_failures=self.max_failures),
            ),
        )

    def _note(self, error: BaseException) -> None:
        """A life has ended by an error: keep its line, and what Ray tells of it in the folder of the body."""
        self.failures.append(error_line(error))
        kept = self.folder / str(self.trainer.run_config.name) / ERRORS
        with contextlib.suppress(OSError), kept.open("a", encoding="utf-8") as file:
            file.write(f"{error}\n\n")

    def _watch(self) -> None:
        import ray

        reason = None
        try:
            self.trainer.fit()
        except BaseException as error:  # whatever ends the group must reach the trials that wait for it
            self.error = error
            reason = error_line(error)
        if ray.is_initialized() and not self.trainer.abandoned.is_set():
            with contextlib.suppress(ray.exceptions.RayError):  # the driver is leaving, and omega with it
                ray.get(self.omega.ended.remote(reason))

    def abandon(self) -> None:
        """The driver leaves early: let go of the workers, which end with the job, before it leaves Ray."""
        self.trainer.abandoned.set()

    def join(self, timeout_seconds: float) -> None:
        """Wait for the thread, which ends when the workers have gone."""
        if self.thread is not None:
            self.thread.join(timeout_seconds)


class Bodies:
    """The bodies of a run, all of one shape, and omega, who speaks for them."""

    def __init__(self, plan: BodyPlan, omega: Any, folder: Path, *, autoscaling: bool) -> None:
        self.plan = plan
        self.omega = omega
        self.folder = folder
        numbers = range(plan.morphology.count)
        self.all = [Body(plan.of_body(n), omega, folder, autoscaling=autoscaling) for n in numbers]

    def manifest(self) -> Bodies:
        """Start the workers of all; returns at once, the first turn waits until they are up."""
        for body in self.all:
            body.prepare()
        for body in self.all:
            body.start()
        return self

    def judge(self, candidates: Sequence[Candidate], split: str, rows_per_domain: int) -> Scores:
        """Held-out scores of adapters; the candidates of a body share one packed pass as far as slots go."""
        import ray

        return ray.get(self.omega.judge.remote(list(candidates), split, rows_per_domain))

    def ask(self, candidates: Sequence[Candidate], questions: Questions) -> dict[str, Replies]:
        """What adapters reply to questions, in packed passes as well."""
        import ray

        return ray.get(self.omega.judge.remote(list(candidates), "", 0, questions))

    def summary(self) -> dict[str, dict[str, Any]]:
        """Where every variant stands, as omega knows it."""
        import ray

        return ray.get(self.omega.summary.remote())

    def describe(self) -> dict[str, Any]:
        """A snapshot of omega: lives, turn, workers, cuts."""
        import ray

        return ray.get(self.omega.describe.remote())

    def lost(self) -> bool:
        """Whether a body will not come back."""
        import ray

        return self._error() is not None or ray.get(self.omega.lost_because.remote()) is not None

    def check(self) -> None:
        """Raises BodyError if a body was lost for good."""
        import ray

        reason = ray.get(self.omega.lost_because.remote()) or self._error()
        if reason is not None:
            before = [line for body in self.all for line in body.failures if str(reason) not in line]
            last = f"; the last before: {before[-1]}" if before else ""
            raise BodyError(f"the body was lost: {reason}{last}", f"see {ERRORS} in {self.folder}; the same command goes on")

    def orphaned(self) -> bool:
        """Whether omega itself is dead, which is not one of the things that a run survives."""
        import ray

        try:
            if ray.is_initialized():
                ray.get(self.omega.lost_because.remote(), timeout=PATIENCE_SECONDS)
        except ray.exceptions.RayActorError:
            return True
        except ray.exceptions.RayError:
            pass
        return False

    def _error(self) -> BaseException | None:
        return next((body.error for body in self.all if body.error is not None), None)

    def abandon(self, timeout_seconds: float = 3.0) -> None:
        """The driver leaves early: let go of the workers, which end with the job, before it leaves Ray."""
        for body in self.all:
            body.abandon()
        self._join(timeout_seconds)

    def dissolve(self, timeout_seconds: float = 60.0) -> None:
        """Let the workers go home and wait for them. How they end is in the weave: all they did is on disk by now."""
        import ray

        ray.get(self.omega.dissolve.remote())
        self._join(timeout_seconds)

    def _join(self, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        for body in self.all:
            body.join(max(0.0, deadline - time.monotonic()))


@contextmanager
def awakened(
    plan: BodyPlan,
    layout: RunLayout,
    population: Population,
    variants: Sequence[Variant],
    address: str | None,
    tell: Callable[[str], None],
) -> Iterator[Bodies]:
    """Bodies after `plan`, and omega, on a cluster of our own or on the one at `address`; they go when the block ends.

    `variants` are those that are there before training. Raises BodyError where there is no room or no cluster.
    """
    shape = plan.morphology
    layout.store.mkdir(exist_ok=True)
    with joined(address):
        if lack := check_room(shape, address):
            tell(lack)
        omega = awaken_omega(
            plan.omega_name,
            layout.store,
            layout.weave,
            [] if population.proposes else variants,
            shape.places,
            barrier=Barrier(shape.places, population.variants, by_rest=population.pauses),
            bodies=shape.count,
            run_ahead=population.runs_ahead,
            order=order_for(population),
            hang_seconds=shape.hang_seconds,
        )
        autoscaling = address is not None  # a cluster of our own cannot grow
        bodies = Bodies(plan.in_namespace(namespace()), omega, layout.bodies, autoscaling=autoscaling).manifest()
        tell(shape.sentence)
        try:
            yield bodies
            bodies.dissolve()
        except BaseException as error:  # Ctrl-C while the workers go home, too
            orphaned = isinstance(error, Exception) and not isinstance(error, ChrysalisError) and bodies.orphaned()
            bodies.abandon()
            if orphaned:
                raise BodyError(
                    "the process that gives bodies their turns has died", "see whether memory ran out; the same command goes on"
                ) from error
            raise
