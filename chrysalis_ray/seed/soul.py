"""The seed of a variant as bytes: everything needed to go on training it, in one safetensors blob.

Tensors are logical and unpadded: ``weight/<module>.lora_A`` [rank, in], ``weight/<module>.lora_B`` [out, rank], and the
moments of the optimizer that `meta` names (``exp_avg/...`` and ``exp_avg_sq/...`` of adamw), of the same shapes. All have one
rank but those modules to which the ``patterns`` of `meta` give another. The rest
(position, step, hyperparameters, epigenome ...) is one canonical JSON string in the metadata, so that equal seeds have equal
bytes. Format 1, written when every optimizer was adamw, is read as well.

A variant whose adapter no pack can hold (`solo.py`) has ``weight/<name>`` and moments under the names of peft's own files, of
any shape, ``initial/<name>`` for what was moved out of the base, ``constant/<name>`` for what its kind keeps beside what is
trained (`kinds.py`) and ``running/<name>`` for what it remembers of its steps (`adalora.py`); its `meta` says of which kind it
is under ``solo``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch

from chrysalis_ray.core.errors import StoreCorrupt, VariantLost
from chrysalis_ray.core.patterns import Patterns
from chrysalis_ray.core.records import MOMENTS, canonical_json
from chrysalis_ray.seed.adapter import MODULE
from chrysalis_ray.seed.tensors import parse_tensors, tensor_bytes, unique_keys

FORMAT = "chrysalis.seed/2"
ADAMW_ONLY = "chrysalis.seed/1"
NEWER = ("solo", "patterns")  # of `meta`, since format 2
KINDS = ("weight", *sorted({name for names in MOMENTS.values() for name in names}))
SOLO_KEY = re.compile(rf"(?P<kind>{'|'.join(KINDS)}|initial|constant|running)/(?P<name>{MODULE.pattern})")
KEY = re.compile(rf"(?P<kind>{'|'.join(KINDS)})/(?P<module>{MODULE.pattern})\.lora_(?P<side>[AB])")


def pack_seed(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> bytes:
    """Bytes of a seed. Raises VariantLost where a tensor or a number of `meta` is not finite, ValueError for wrong keys."""
    problem = _problem_of(tensors, meta, meta.get("optimizer", "adamw"))
    if problem:
        raise ValueError(problem)
    who = meta.get("variant_id", "the variant")
    try:
        envelope = canonical_json({"format": FORMAT, "meta": dict(meta)}).decode()
        return tensor_bytes(tensors, "seed", envelope)
    except ValueError as error:
        raise VariantLost(f"{who} cannot be kept: {error}", "lower its learning rate, or set a clip") from error


def unpack_seed(content: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and meta of a seed. Raises StoreCorrupt for bytes that `pack_seed` cannot have written."""
    try:
        tensors, metadata = parse_tensors(content)
        envelope = json.loads(metadata.get("seed", "null"), object_pairs_hook=unique_keys)
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreCorrupt(f"a seed cannot be read: {error}", "go back to the cut before") from error
    known = isinstance(envelope, dict) and envelope.get("format") in (FORMAT, ADAMW_ONLY)
    if not known or not isinstance(envelope.get("meta"), dict):
        raise StoreCorrupt(f"these bytes are not a {FORMAT}", "go back to the cut before")
    meta = envelope["meta"]
    newer = [name for name in NEWER if name in meta and envelope["format"] == ADAMW_ONLY]
    problem = f"one of format 1 has no {newer[0]}" if newer else None
    problem = problem or _problem_of(tensors, meta, meta.get("optimizer", "adamw") if envelope["format"] == FORMAT else "adamw")
    if problem:
        raise StoreCorrupt(f"a seed cannot be read: {problem}", "go back to the cut before")
    return tensors, meta


def _problem_of(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], optimizer: Any) -> str | None:
    """What is wrong with a seed, or None."""
    if "solo" in meta:
        return _solo_problem(tensors, optimizer)
    told = meta.get("patterns", {})
    try:
        patterns = Patterns.from_json(told)
        sound = told == patterns.to_json() and all(type(rank) is int and rank > 0 for rank in patterns.ranks.values())
        sound = sound and all(alpha > 0 for alpha in patterns.alphas.values())
    except (AttributeError, TypeError, ValueError):
        sound = False
    return _problem(tensors, optimizer, patterns) if sound else f"its patterns {told!r} are none"


def _solo_problem(tensors: Mapping[str, torch.Tensor], optimizer: Any) -> str | None:
    moments = MOMENTS.get(optimizer) if isinstance(optimizer, str) else None
    if moments is None:
        return f"its optimizer {optimizer!r} is none of {', '.join(MOMENTS)}"
    kinds: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in tensors.items():
        match = SOLO_KEY.fullmatch(name)
        if match is None:
            return f"tensor {name!r} is not part of a seed"
        if tensor.dtype not in (torch.float32, torch.float64):
            return f"tensor {name!r} is {tensor.dtype}, not a float"
        kinds.setdefault(match["kind"], {})[match["name"]] = tensor.shape
    weights, initial = kinds.pop("weight", {}), kinds.pop("initial", {})
    kinds.pop("constant", None)
    kinds.pop("running", None)
    if not weights:
        return "it holds no weights"
    if kinds and sorted(kinds) != sorted(moments):
        return f"it has the moments {', '.join(sorted(kinds))}, {optimizer} has {', '.join(moments)}"
    for kind, shapes in kinds.items():
        if shapes != weights:
            return f"its {kind} are not those of its weights"
    if initial and initial != {name: shape for name, shape in weights.items() if ".lora_" in name}:
        return "what was moved out of the base does not have the shapes of A and B"
    return None


def _problem(tensors: Mapping[str, torch.Tensor], optimizer: Any, patterns: Patterns) -> str | None:
    """What is wrong with the names, types and shapes of a seed, or None."""
    moments = MOMENTS.get(optimizer) if isinstance(optimizer, str) else None
    if moments is None:
        return f"its optimizer {optimizer!r} is none of {', '.join(MOMENTS)}"
    kinds: dict[str, set[str]] = {kind: set() for kind in KINDS}
    ranks: set[int] = set()  # of modules without one of their own
    for name, tensor in tensors.items():
        match = KEY.fullmatch(name)
        if match is None:
            return f"tensor {name!r} is not part of a seed"
        if tensor.ndim != 2 or tensor.dtype not in (torch.float32, torch.float64):
            return f"tensor {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, not a float matrix"
        own = name.removeprefix(f"{match['kind']}/")
        kinds[match["kind"]].add(own)
        rank = tensor.shape[0 if match["side"] == "A" else 1]
        if (fixed := patterns.kind_of(match["module"]).rank) is None:
            ranks.add(rank)
        elif rank != fixed:
            return f"tensor {name!r} has rank {rank}, by its patterns it is {fixed}"
        weight = tensors.get(f"weight/{own}")
        if weight is None or weight.shape != tensor.shape:
            return f"tensor {name!r} has no weight of its shape beside it"
    if not kinds["weight"]:
        return "it holds no weights"
    for own in kinds["weight"]:
        twin = own[:-1] + ("B" if own.endswith("A") else "A")
        if twin not in kinds["weight"]:
            return f"weight {own!r} stands without {twin!r}"
    found = [kind for kind in KINDS[1:] if kinds[kind]]
    for kind in found:
        if kinds[kind] != kinds["weight"]:
            return f"{len(kinds['weight'])} weights have {len(kinds[kind])} tensors of {kind}"
    if found and found != sorted(moments):
        return f"it has the moments {', '.join(found)}, {optimizer} has {', '.join(moments)}: one is missing or foreign"
    if len(ranks) > 1:
        return f"it mixes ranks {sorted(ranks)}"
    return None
