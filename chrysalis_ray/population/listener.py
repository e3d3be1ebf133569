"""Tune's callback in the driver: it tells omega who is done for good, and the story's listener what happened."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import ray
from ray.tune import Callback, Stopper

from chrysalis_ray.core.errors import error_line
from chrysalis_ray.core.records import sha256_of
from chrysalis_ray.population.words import DIVERGED, METRIC

Row = dict[str, Any]

# Tune adds these to every result; they describe the light trial process, not the variant.
TUNES_OWN = frozenset(
    ("done", "config", "date", "experiment_tag", "hostname", "iterations_since_restore", "node_ip", "pid", "time_since_restore",
     "time_this_iter_s", "time_total_s", "timestamp", "training_iteration", "trial_id", "warmup_time", "should_checkpoint",
     "checkpoint_dir_name")
)  # fmt: skip


class PopulationListener(Callback):
    """`on_row` gets every report of every variant as one flat row, `on_conclusion` the end of each variant.

    With `tell_rest` omega also hears when Tune rests: a whole step brought it nothing and left nothing to start.
    """

    def __init__(
        self,
        omega: Any,
        on_row: Callable[[Row], None],
        on_conclusion: Callable[[str, str, str | None], None],
        tell_rest: bool = False,
    ) -> None:
        self.omega = omega
        self.on_row = on_row
        self.on_conclusion = on_conclusion
        self.tell_rest = tell_rest
        self.last: dict[str, Row] = {}  # trial -> its last row
        self.results = 0
        self.scene: Any = None
        self.told: Any = None

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self.tell_rest:
            self.scene = self._scene(trials)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """A step first starts what there is to start: one that changed nothing had nothing to start."""
        busy = any(trial.status == "PENDING" or trial.is_saving for trial in trials)
        if self.tell_rest and not busy and self.scene == self._scene(trials):
            self._rest(trials)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        if self.tell_rest:
            self._rest(trials)

    def _rest(self, trials: list[Any]) -> None:
        heard = {row["variant"]: row["position"] for row in self.last.values()}
        running = sorted(trial.config["variant"] for trial in trials if trial.status == "RUNNING")
        if self.told != (heard, running):
            ray.get(self.omega.rest.remote(heard, running))
            self.told = (heard, running)

    def _scene(self, trials: list[Any]) -> Any:
        return self.results, [(trial.trial_id, trial.status) for trial in trials]

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Row, **info: Any) -> None:
        row = {key: value for key, value in result.items() if key not in TUNES_OWN}
        row[METRIC] = None if row[METRIC] == DIVERGED else row[METRIC]
        self.last[trial.trial_id] = row
        self.results += 1
        self.on_row(row)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        row = self.last.get(trial.trial_id)
        variant_id = row["variant"] if row else trial.config["variant"]
        if row and row["state"] == "evicted":
            by_gradients = f"its last steps had gradients that are not finite ({row['skipped']} steps skipped in all)"
            self._conclude(variant_id, "evicted", row.get("reason") or by_gradients)
        elif row and row["complete"]:
            self._conclude(variant_id, "finished", None)
        else:
            self._conclude(variant_id, "stopped", f"the scheduler stopped it after report {row['report'] if row else 0}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        row = self.last.get(trial.trial_id)
        self._conclude(
            row["variant"] if row else trial.config["variant"],
            "failed",
            error_line(trial.get_error() or "the trial process died"),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return PopulationListener, (None, _ignore, _ignore)  # Tune writes its callbacks to disk; nobody listens there

    def _conclude(self, variant_id: str, state: str, reason: str | None) -> None:
        ray.get(self.omega.conclude.remote(variant_id, state, reason))
        self.on_conclusion(variant_id, state, reason)


class UntilBodyLost(Stopper):
    """Ends the tune run when no body is left to train in: trials cannot be retried into nothing.

    Tune asks its stopper about a result before its scheduler decides on it. Schedulers draw from the generators of this
    process, and so does Tune itself, as often as it happens to poll: here they are seeded by what was reported.
    """

    def __init__(self, lost: Callable[[], bool], rng_seed: int) -> None:
        self.lost = lost
        self.rng_seed = rng_seed

    def __call__(self, trial_id: str, result: Row) -> bool:
        seed_generators(self.rng_seed, result["position"])
        return False

    def stop_all(self) -> bool:
        return self.lost()

    def __reduce__(self) -> tuple[Any, ...]:
        return UntilBodyLost, (_never, self.rng_seed)  # Tune writes its stopper to disk; nothing is ever restored from there


def seed_generators(*name: Any) -> None:
    """Seed Python's and numpy's global generators by a name."""
    rng_seed = int(sha256_of(name)[:8], 16)
    random.seed(rng_seed)
    numpy.random.seed(rng_seed)


def _never() -> bool:
    return False


def _ignore(*told: Any) -> None:
    """Hears and does nothing."""
