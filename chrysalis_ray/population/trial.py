"""A virtual trial: what Tune sees of a variant. A light process without torch; the training happens in a body.

A trial knows its variant and its position, nothing more. `step` asks omega for the next position; a checkpoint is the
position written down; an exploit is loading somebody else's position under new hyperparameters.
"""

from __future__ import annotations

import uuid
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ray

from chrysalis_ray.body.turn import Answer, first_position
from chrysalis_ray.core.postponed import postponed
from chrysalis_ray.core.records import Hyperparameters, Variant, read_json, write_json
from chrysalis_ray.genome.epigenome import appended
from chrysalis_ray.population.words import DIVERGED, LEVEL, METRIC

with postponed():
    from ray import tune
    from ray.tune.execution.placement_groups import PlacementGroupFactory

CHECKPOINT = "position.json"
# What comes with the weights and moments when a trial takes over another's position.
SHAPE = ("rank", "alpha", "use_rslora", "optimizer", "freeze_a")
TUNABLE = tuple(f.name for f in fields(Hyperparameters) if f.name not in SHAPE)


class VariantTrial(tune.Trainable):
    """Owns one slot. `config` holds `omega`, `namespace`, `variants` (a folder), `memory` (bytes that this process reserves),
    `variant` and what Tune may change."""

    who: str
    omega: Any
    variant: Variant
    position: str
    chunk: int

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        # not tune.with_resources: that sends a class of its own, whose making imports Ray before this file can postpone
        return PlacementGroupFactory([{"memory": config["memory"]}])

    def setup(self, config: dict[str, Any]) -> None:
        self.who = uuid.uuid4().hex  # this process, told apart from one that it follows
        self.omega = ray.get_actor(config["omega"], namespace=config["namespace"])
        self._become(config)

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

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        ray.get(self.omega.hold.remote(self.variant.variant_id, self.position))
        write_json(
            Path(checkpoint_dir) / CHECKPOINT,
            {"variant": self.variant.to_json(), "position": self.position, "chunk": self.chunk},
        )

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]
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

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._become(new_config)  # the process may serve another trial now
        return True

    def cleanup(self) -> None:
        ray.get(self.omega.detach.remote(self.variant.variant_id, self.who))
