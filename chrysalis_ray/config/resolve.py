"""An experiment and its blueprint become one: what the experiment sets overrides what the blueprint sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chrysalis_ray.config.blueprint import Base, Blueprint, BodyPatch, PretrainedBase
from chrysalis_ray.config.experiment import Experiment
from chrysalis_ray.core.records import sha256_of

# The body that stands when neither file says anything: one CPU worker. `threads` stays open: the worker then takes its CPUs.
BODY_FLOOR = BodyPatch(
    count=1, workers=1, gpus_per_worker=0.0, cpus_per_worker=1.0, slots=8, zero_stage=0, offload="none", precision="fp32",
    quantization="none", attention="sdpa", lanes="compacted", activation_checkpointing=False, compile=False,
)  # fmt: skip

# Words for people and for W&B: changing them does not make it another run.
COSMETIC = ("description", "tracking")


def resolve_body(experiment: Experiment, blueprint: Blueprint) -> BodyPatch:
    """Every field of the body, the experiment's over the blueprint's over `BODY_FLOOR`."""
    floor = BODY_FLOOR.model_copy(update={"slots": 1}) if blueprint.lora.solo else BODY_FLOOR
    patches = (floor, blueprint.body, experiment.body)
    fields: dict[str, Any] = {}
    for patch in patches:
        fields.update(patch.model_dump(exclude_none=True))
    return BodyPatch(**fields)


def is_local(model: str) -> bool:
    """Whether `model` or `path` was written as a folder (``./x``, ``../x``, ``/x``, ``~/x``) and not as a hub id."""
    return model.startswith(("./", "../", "/", "~")) or model in (".", "..")


@dataclass(frozen=True)
class LoadedExperiment:
    """Two files as read, and what they say together. `text` and `blueprint_text` are the files' exact characters."""

    experiment: Experiment
    blueprint: Blueprint
    path: Path
    blueprint_path: Path
    text: str
    blueprint_text: str
    overrides: tuple[str, ...] = ()

    @property
    def base(self) -> Base:
        """The base model to use; a local folder is made absolute, seen from the file that names it."""
        written_in = self.path if self.experiment.base is not None else self.blueprint_path
        base = self.experiment.base or self.blueprint.base
        if isinstance(base, PretrainedBase) and is_local(base.model):
            return base.model_copy(update={"model": str((written_in.parent / Path(base.model).expanduser()).resolve())})
        return base

    @property
    def chat_template(self) -> Path | None:
        """The file of a chat template that stands in for the base's own; seen from the file that names it."""
        written = (self.experiment.base, self.path) if self.experiment.base else (self.blueprint.base, self.blueprint_path)
        base, file = written
        if not isinstance(base, PretrainedBase) or base.chat_template is None:
            return None
        return file.parent / Path(base.chat_template).expanduser()

    @property
    def body(self) -> BodyPatch:
        """The body with every field set (`threads` may stay None)."""
        return resolve_body(self.experiment, self.blueprint)

    @property
    def places(self) -> int:
        """Variants that can train at once, in all bodies together; those of one slot each where `slots` is still open."""
        slots = self.body.slots if isinstance(self.body.slots, int) else 1
        return slots * (self.body.count or 1)

    @property
    def folder(self) -> Path:
        """Where relative source paths start."""
        return self.path.parent

    def resolved(self) -> dict[str, Any]:
        """What will be run, as canonical JSON content: ``{"experiment", "blueprint", "sha256"}``.

        `base` and `body` stand resolved in the experiment and are left out of the blueprint. The hash leaves out `COSMETIC`
        fields and the name of the blueprint's file, so that a run survives a reworded description or a moved file.
        """
        experiment = self.experiment.model_dump(mode="json")
        experiment["base"] = (self.experiment.base or self.blueprint.base).model_dump(mode="json")
        experiment["body"] = self.body.model_dump(mode="json")
        blueprint = self.blueprint.model_dump(mode="json", exclude={"base", "body"})
        return {"experiment": experiment, "blueprint": blueprint, "sha256": sha256_of(_essence(experiment, blueprint))}


def _essence(experiment: dict[str, Any], blueprint: dict[str, Any]) -> dict[str, Any]:
    left_out = (*COSMETIC, "blueprint")
    return {
        "experiment": {key: value for key, value in experiment.items() if key not in left_out},
        "blueprint": {key: value for key, value in blueprint.items() if key not in COSMETIC},
    }
