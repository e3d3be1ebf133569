"""Checkpoints of a trial as Ray Tune writes, keeps and reads them. Loaded with the first one: it imports Tune."""

from __future__ import annotations

from typing import Any, Protocol

from chrysalis_ray.core.postponed import postponed

with postponed():
    from ray import tune
    from ray.tune.experiment.trial import StorageContext


class Saved(Protocol):
    """What a trial has for this: where Tune keeps its checkpoints, its last result, and how one of its positions is written."""

    @property
    def storage(self) -> Any: ...
    @property
    def last(self) -> dict[str, Any]: ...
    def get_current_ip_pid(self) -> tuple[str, int]: ...
    def save_checkpoint(self, checkpoint_dir: str) -> None: ...
    def load_checkpoint(self, checkpoint_dir: str) -> None: ...


class Saving(tune.Trainable):
    """Ray's trainable as far as it saves and restores; what is written and read is the trial's."""

    def __init__(self, trial: Saved) -> None:  # not Ray's own, which sets up a process
        self.trial = trial
        self._storage = StorageContext(**trial.storage._asdict()) if trial.storage else None  # counts checkpoints
        self._local_ip = trial.get_current_ip_pid()[0]

    def save(self, checkpoint_dir: str | None = None) -> Any:
        self._last_result = self.trial.last  # type: ignore[assignment]
        return super().save(checkpoint_dir)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        self.trial.save_checkpoint(checkpoint_dir)

    def load_checkpoint(self, checkpoint_dir: Any) -> None:
        self.trial.load_checkpoint(checkpoint_dir)

    @property
    def seconds(self) -> float:
        """What the trial had taken when the checkpoint was written."""
        return float(self._time_total)
