"""An experiment and its blueprint become one: what the experiment sets overrides what the blueprint sets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from chrysalis_ray.config.blueprint import Base, Blueprint, BodyPatch, OpenBody, PretrainedBase
from chrysalis_ray.config.experiment import Experiment
from chrysalis_ray.core.records import sha256_of
from chrysalis_ray.core.written_paths import written_path

# The body that stands when neither file says anything: one CPU worker. `threads` stays open: the worker then takes its CPUs.
BODY_FLOOR = BodyPatch(
    count=1, workers=1, gpus_per_worker=0.0, cpus_per_worker=1.0, slots=8, zero_stage=0, offload="none", precision="fp32",
    quantization="none", attention="sdpa", lanes="compacted", activation_checkpointing=False, compile=False,
    gradients="whole",
)  # fmt: skip

# What the planner chooses where it is `auto`, beside `slots`; until then the floor stands in its place.
PLANNED = ("count", "workers", "zero_stage", "offload", "activation_checkpointing")

# Words for people and for W&B: changing them does not make it another run.
COSMETIC = ("description", "use_policy", "tracking")
# What of a body says where and by how many a variant is computed, not what: a run goes on with another one.
MOVABLE = (
    "workers", "gpus_per_worker", "cpus_per_worker", "threads", "zero_stage", "offload", "nvme_path",
    "activation_checkpointing", "gradients", "hang_seconds",
)  # fmt: skip


def written_body(experiment: Experiment, blueprint: Blueprint) -> OpenBody:
    """Every field of the body, the experiment's over the blueprint's over `BODY_FLOOR`; some may be `auto`."""
    floor = BODY_FLOOR.model_copy(update={"slots": 1}) if blueprint.worn.solo else BODY_FLOOR
    patches = (floor, blueprint.body, experiment.body)
    fields: dict[str, Any] = {}
    for patch in patches:
        fields.update(patch.model_dump(exclude_none=True))
    return OpenBody(**fields)


def open_fields(body: OpenBody) -> tuple[str, ...]:
    """The fields of a body, beside its slots, that the planner is to choose."""
    return tuple(name for name in PLANNED if getattr(body, name) == "auto")


def is_local(model: str) -> bool:
    """Whether `model` or `path` was written as a folder (``./x``, ``../x``, ``/x``, ``~/x``) and not as a hub id."""
    return model.startswith(("./", "../", "/", "~")) or model in (".", "..")


def located(base: Base, written_in: Path) -> Base:
    """`base` with an absolute folder, seen from the file that names it."""
    if isinstance(base, PretrainedBase) and is_local(base.model):
        return base.model_copy(update={"model": str((written_in.parent / written_path(base.model)).resolve())})
    return base


def lacking(written: Base, found: Base) -> str | None:
    """What a folder lacks that was `written` as a base and means `found`; None for one with a model, and for other bases."""
    if not isinstance(written, PretrainedBase) or not isinstance(found, PretrainedBase) or not is_local(written.model):
        return None
    folder = Path(found.model)
    if not folder.is_dir():
        return f"no folder {folder}; write a hub id such as Qwen/Qwen3-0.6B or a folder with config.json"
    return (
        None if (folder / "config.json").is_file() else f"{folder} holds no config.json; a Hugging Face model folder was meant"
    )


@dataclass(frozen=True)
class Chosen:
    """A blueprint that rules chose: its YAML, a reason for each thing chosen, and what `tokens_per_variant: auto` means.

    `question` is the hash of what it was chosen for, the machine aside; empty outside of experiments. `probed` says that a
    short population has decided, and that the text is the winner's."""

    text: str
    reasons: tuple[str, ...]
    tokens: int
    question: str = ""
    probed: bool = False

    def to_json(self) -> dict[str, Any]:
        told = {"text": self.text, "reasons": list(self.reasons), "tokens": self.tokens, "question": self.question}
        return told | ({"probed": True} if self.probed else {})

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Chosen:
        """Raises KeyError or TypeError for what `to_json` cannot have written."""
        reasons = tuple(map(str, value["reasons"]))
        return cls(str(value["text"]), reasons, int(value["tokens"]), str(value["question"]), value.get("probed") is True)


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
    chosen: Chosen | None = None  # where the experiment says `blueprint: auto`, or a probe has decided
    selected: tuple[str, ...] = ()  # what the blueprint leaves out of the genome, in words
    candidates: tuple[tuple[str, LoadedExperiment], ...] = ()  # what its probe is to decide between, by name; itself the first

    @property
    def base(self) -> Base:
        """The base model to use; a local folder is made absolute, seen from the file that names it."""
        if self.experiment.base is not None:
            return located(self.experiment.base, self.path)
        return located(self.blueprint.base, self.blueprint_path)

    @property
    def chat_template(self) -> Path | None:
        """The file of a chat template that stands in for the base's own; seen from the file that names it."""
        written = (self.experiment.base, self.path) if self.experiment.base else (self.blueprint.base, self.blueprint_path)
        base, file = written
        if not isinstance(base, PretrainedBase) or base.chat_template is None:
            return None
        return file.parent / written_path(base.chat_template)

    @cached_property
    def written_body(self) -> OpenBody:
        """The body as the two files say it: every field set (`threads` may stay None), some of them `auto`."""
        return written_body(self.experiment, self.blueprint)

    @cached_property
    def open(self) -> tuple[str, ...]:
        """What of the body, beside its slots, is still to be planned."""
        return open_fields(self.written_body)

    @cached_property
    def body(self) -> BodyPatch:
        """The body with every field set; the floor's where it is still to be planned (`slots` may stay `auto`)."""
        return BodyPatch(**(self.written_body.model_dump() | {name: getattr(BODY_FLOOR, name) for name in self.open}))

    def with_body(self, **fields: Any) -> LoadedExperiment:
        """The same experiment with other fields of its body."""
        body = self.experiment.body.model_copy(update=fields)
        return replace(self, experiment=self.experiment.model_copy(update={"body": body}))

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

        `base`, `genome` and `body` stand resolved in the experiment and are left out of the blueprint. The hash leaves out
        `COSMETIC` fields, the `MOVABLE` ones of the body and the name of the blueprint's file: a run survives a reworded
        description or a moved file, and goes on with more workers.
        """
        experiment = self.experiment.model_dump(mode="json", exclude=None if self.experiment.probe else {"probe"})
        experiment["base"] = (self.experiment.base or self.blueprint.base).model_dump(mode="json")
        experiment["body"] = self.written_body.model_dump(mode="json")
        blueprint = self.blueprint.model_dump(mode="json", exclude={"base", "genome", "body"})
        for part, name in ((blueprint, "adapter"), (blueprint["lora"], "exclude"), (blueprint["lora"], "layers")):
            if not part[name]:  # runs of before there were these go on
                del part[name]
        return {"experiment": experiment, "blueprint": blueprint, "sha256": sha256_of(essence(experiment, blueprint))}


def essence(experiment: dict[str, Any], blueprint: dict[str, Any]) -> dict[str, Any]:
    """What a run directory belongs to."""
    left_out = (*COSMETIC, "blueprint")
    body = {key: value for key, value in experiment["body"].items() if key not in MOVABLE}
    return {
        "experiment": {**{key: value for key, value in experiment.items() if key not in left_out}, "body": body},
        "blueprint": {key: value for key, value in blueprint.items() if key not in COSMETIC},
    }
