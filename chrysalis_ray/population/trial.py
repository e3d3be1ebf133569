"""A virtual trial: what Tune sees of a variant. A light process without torch; the training happens in a body.

A trial knows its variant and its position, nothing more. `step` asks omega for the next position; a checkpoint is the
position written down; an exploit is loading somebody else's position under new hyperparameters.

Tune's controller calls here what it calls of a `ray.tune.Trainable`, and hears the same. The class is none, for to import Tune
takes a process longer than all else that it does here: what Ray does with checkpoints is loaded with the first (`saving.py`).
"""

from __future__ import annotations

import os
import platform
import time
import uuid
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ray

from chrysalis_ray.body.turn import Answer, first_position
from chrysalis_ray.core.records import Hyperparameters, Variant, read_json, write_json
from chrysalis_ray.genome.epigenome import appended
from chrysalis_ray.population.words import DIVERGED, LEVEL, METRIC, TRIAL, TUNES

if TYPE_CHECKING:
    from chrysalis_ray.population.saving import Saving

CHECKPOINT = "position.json"
# What comes with the weights and moments when a trial takes over another's position.
SHAPE = ("rank", "alpha", "use_rslora", "optimizer", "freeze_a")
TUNABLE = tuple(f.name for f in fields(Hyperparameters) if f.name not in SHAPE)


class Storage(NamedTuple):
    """Where Tune keeps a trial's checkpoints, and the number of the last: what a `StorageContext` of Ray's is made of."""

    storage_path: str
    experiment_dir_name: str
    trial_dir_name: str
    current_checkpoint_index: int


class VariantTrial:
    """Owns one slot. `config` holds `omega`, `namespace`, `variants` (a folder), `memory` (bytes that this process reserves),
    `variant` and what Tune may change; and, under names that begin as `TUNES` says, what Tune adds to it."""

    who: str
    omega: Any
    variant: Variant
    position: str
    chunk: int
    config: dict[str, Any]
    trial_id: str
    storage: Storage | None
    saving: Saving | None
    iterations: int
    restored_at: int
    seconds: float
    seconds_restored: float
    last: dict[str, Any]

    def __init__(self, config: dict[str, Any], storage: Storage | None = None) -> None:
        self.who = uuid.uuid4().hex  # this process, told apart from one that it follows
        self.omega = ray.get_actor(config["omega"], namespace=config["namespace"])
        self.reset(config, storage)

    def reset(self, new_config: dict[str, Any], storage: Storage | None = None) -> bool:
        """Be the trial that this config is of; this process may have served another before. Returns True."""
        self.storage = storage
        self.saving = None
        self.trial_id = new_config.get(TRIAL, "default")
        self.config = {name: value for name, value in new_config.items() if not name.startswith(TUNES)}
        self.iterations, self.restored_at, self.seconds, self.seconds_restored = 0, 0, 0.0, 0.0
        self.last = {}
        self._become(self.config)
        return True

    def _become(self, config: dict[str, Any]) -> None:
        # An exploit copies the donor's whole config; who this trial is was settled when Tune first started it.
        variant_id: str = ray.get(self.omega.identify.remote(self.trial_id, config["variant"]))
        self.variant = Variant.from_json(read_json(Path(config["variants"]) / variant_id / "variant.json"))
        self.position = first_position(self.variant)
        self.chunk = 0
        self._configure(config)

    def _configure(self, config: dict[str, Any]) -> None:
        changed = {name: config[name] for name in TUNABLE if name in config}
        mix = self.variant.epigenome
        levels = {key.removeprefix(LEVEL): float(value) for key, value in config.items() if key.startswith(LEVEL)}
        row = self.chunk * self.variant.chunk_steps * self.variant.rows_per_step
        self.variant = replace(
            self.variant,
            hyperparameters=replace(self.variant.hyperparameters, **changed),
            epigenome=appended(mix, row, levels),
        )

    def train(self) -> dict[str, Any]:
        """One `step`, and what Tune's controller wants to know beside it."""
        started = time.monotonic()
        result = self.step()
        seconds = time.monotonic() - started
        self.iterations += 1
        self.seconds += seconds
        self.last = {
            **result,
            **self.get_auto_filled_metrics(),
            "training_iteration": self.iterations,
            "iterations_since_restore": self.iterations - self.restored_at,
            "time_this_iter_s": seconds,
            "time_total_s": self.seconds,
            "time_since_restore": self.seconds - self.seconds_restored,
        }
        return self.last

    def get_auto_filled_metrics(self, debug_metrics_only: bool = True) -> dict[str, Any]:
        """What a trial can tell before its first report, too."""
        address, process = self.get_current_ip_pid()
        now = datetime.now()
        return {
            "trial_id": self.trial_id,
            "date": now.strftime("%Y-%m-%d_%H-%M-%S"),
            "timestamp": int(now.timestamp()),
            "pid": process,
            "hostname": platform.node(),
            "node_ip": address,
            "config": self.config,
        }

    def get_current_ip_pid(self) -> tuple[str, int]:
        return ray.util.get_node_ip_address(), os.getpid()

    def step(self) -> dict[str, Any]:
        """Train one chunk. The result carries the variant's own metrics, by its own tokens."""
        answer: Answer = ray.get(self.omega.advance.remote(self.variant, self.position, self.chunk, self.who))
        self.position, self.chunk = answer.position, answer.chunk
        evicted, complete = answer.metrics["state"] == "evicted", self.chunk >= self.variant.chunks
        return {
            **answer.metrics,
            METRIC: DIVERGED if answer.metrics[METRIC] is None else answer.metrics[METRIC],
            "variant": self.variant.variant_id,
            "report": self.chunk,
            "position": self.position,
            "hyperparameters": self.variant.hyperparameters.to_json(),
            "epigenome": self.variant.epigenome.to_json(),
            "complete": complete,
            "done": evicted or complete,
        }

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """Write a checkpoint to where Tune keeps them; returns what `restore` takes."""
        return self._saver().save(checkpoint_dir)

    def restore(self, checkpoint: Any) -> None:
        """Go on from a checkpoint, this trial's or another's."""
        saver = self._saver()
        saver.restore(checkpoint)
        self.iterations = self.restored_at = saver.iteration
        self.seconds = self.seconds_restored = saver.seconds

    def _saver(self) -> Saving:
        """What counts this trial's checkpoints."""
        if self.saving is None:
            from chrysalis_ray.population.saving import Saving

            self.saving = Saving(self)
        return self.saving

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        ray.get(self.omega.hold.remote(self.variant.variant_id, self.position))
        write_json(
            Path(checkpoint_dir) / CHECKPOINT,
            {"variant": self.variant.to_json(), "position": self.position, "chunk": self.chunk},
        )

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        saved = read_json(Path(checkpoint_dir) / CHECKPOINT)
        donor = Variant.from_json(saved["variant"])
        self.position, self.chunk = saved["position"], saved["chunk"]
        if donor.variant_id == self.variant.variant_id:
            self.variant = donor
        else:
            shape = {name: getattr(donor.hyperparameters, name) for name in SHAPE}
            inherited = replace(self.variant.hyperparameters, **shape)
            bred = any(
                key.startswith(LEVEL) for key in self.config
            )  # levels are mutated: go on from the schedule that led here
            self.variant = replace(
                self.variant,
                hyperparameters=inherited,
                epigenome=donor.epigenome if bred else self.variant.epigenome,
                parents=(*self.variant.parents, self.position),
            )
        self._configure(self.config)

    def stop(self) -> None:
        """Tune has done with this process."""
        ray.get(self.omega.detach.remote(self.variant.variant_id, self.who))
