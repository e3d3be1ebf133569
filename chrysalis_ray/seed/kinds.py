"""Adapters of other kinds than LoRA by peft's own classes: their configs, and the folders that plain peft loads.

Beside what is trained some kinds keep constants in their folders: the matrices that VeRA's modules share, the norms that DeLoRA
took of the base. They stand in a seed as ``constant/<name>``, so that no other version of torch need draw them alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from chrysalis_ray.config.adapters import KINDS, PeftAdapter
from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.core.records import Hyperparameters, canonical_json
from chrysalis_ray.seed.adapter import CONFIG, PREFIX, WEIGHTS, read_config, weights_file, write_folder
from chrysalis_ray.seed.tensors import parse_tensors, tensor_bytes

CONSTANT = "constant/"
OF_THE_BASE = ("base_model_name_or_path", "revision", "inference_mode", "task_type")  # the same for adapters of all kinds


def form_of_kind(adapter: PeftAdapter) -> dict[str, Any]:
    """What a seed says of the kind of its adapter: all but what differs between variants."""
    return adapter.model_dump(mode="json", exclude={"rank", "alpha"})


def peft_config(adapter: PeftAdapter, own: Hyperparameters, steps: int | None = None) -> Any:
    """The config of a variant of so many steps, by peft's class for the kind. Raises ValueError or TypeError for what peft
    refuses."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    make: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(adapter.type.upper())]
    return make(task_type="CAUSAL_LM", **adapter.settings(own.rank, own.alpha, steps))


def constants_of(model: Any, trained: Mapping[str, Any]) -> dict[str, Tensor]:
    """What peft writes of an adapter beside what is `trained`, as views of what the layers use."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    named = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if name not in trained}


def write_kind(folder: Path, tensors: Mapping[str, Tensor], form: Mapping[str, Any], own: Hyperparameters, seed: Path) -> str:
    """The adapter in the tensors of a seed as a PEFT folder; returns its sha256. `seed` is the folder of adapter zero."""
    zero = read_config(seed)
    config = _plain(peft_config(KINDS[form["type"]].model_validate(form), own).to_dict())
    config |= {key: zero.get(key) for key in OF_THE_BASE}
    if "fan_in_fan_out" in config:
        config["fan_in_fan_out"] = zero.get("fan_in_fan_out", False)
    parts = ("weight/", CONSTANT)
    kept = {name.removeprefix(part): value for part in parts for name, value in tensors.items() if name.startswith(part)}
    named = {(name if name.startswith("base_model.") else f"{PREFIX}{name}"): value.float() for name, value in kept.items()}
    text = json.dumps(json.loads(canonical_json(config)), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    try:
        return write_folder(folder, {CONFIG: text.encode(), WEIGHTS: tensor_bytes(named, "format", "pt")})
    except ValueError as error:
        raise MergeError(f"the adapter cannot be written: {error}", "leave out the variant that diverged") from error


def read_kind(folder: Path, adapter: PeftAdapter) -> tuple[Hyperparameters, dict[str, Tensor]]:
    """Geometry and tensors of an adapter of this kind. Raises MergeError for one that is not of it."""
    config, kind = read_config(folder), adapter.type.upper()
    if config.get("peft_type") != kind:
        raise MergeError(f"{folder}: peft_type is {config.get('peft_type')!r}, not {kind!r}", "give an adapter of this run")
    geometry = Hyperparameters(rank=config.get("r") or 1, alpha=config.get("alpha") or 1.0)
    for key, wanted in _plain(adapter.settings(geometry.rank, geometry.alpha)).items():
        found = sorted(config[key]) if isinstance(config.get(key), list) else config.get(key)
        if found != (sorted(wanted) if isinstance(wanted, list) else wanted):
            raise MergeError(f"{folder}: {key} is {found!r}, the blueprint says {wanted!r}", "give an adapter of this run")
    try:
        tensors, _ = parse_tensors(weights_file(folder).read_bytes())
    except ValueError as error:
        raise MergeError(f"{folder}: {error}", "copy or export the adapter again") from error
    return geometry, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON content: sets as lists."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
