"""Adapter zero: the one adapter from which every variant branches. A as peft draws it, or as the data asks, and B zero, so that
it changes nothing.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from chrysalis_ray.config.adapters import PeftAdapter
from chrysalis_ray.config.blueprint import Lora
from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.core.patterns import means, nearest_key
from chrysalis_ray.seed.adapter import PREFIX, AdapterWeights, write_adapter


def write_adapter_zero(
    base_folder: Path,
    base_name: str,
    worn: Lora | PeftAdapter,
    rank: int,
    rng_seed: int,
    folder: Path,
    revision: str | None = None,
    directions: Mapping[str, torch.Tensor] | None = None,
) -> str:
    """Write adapter zero of `rank` for the base at `base_folder` and return its sha256.

    Only the base's config is read. peft itself says which modules the targets mean; A is drawn per module as peft draws it
    (Kaiming uniform with a = sqrt(5), that is U(-1/sqrt(in), 1/sqrt(in))) from a generator of (rng_seed, module name), so
    that it depends neither on the order of modules nor on other targets. The bound does not depend on the rank: a variant
    of smaller rank takes the first rows of A. `directions` gives the A [rank, in] of every module instead, best rows first.

    For adapters of another kind it stands for the base as it is, and for what peft will draw: a LoRA all the same, on every
    linear module where the targets are others.

    Raises ModelError for a target that is no linear module of the base, and for directions of other modules or shapes.
    """
    wanted = worn.targets if isinstance(worn, Lora) or worn.linear else None
    shapes, transposed = _target_shapes(base_folder, worn, wanted)
    is_narrowed = isinstance(worn, Lora) and worn.is_narrowed
    spread = 1.0 / rank if isinstance(worn, Lora) and worn.init == "gaussian" else None
    factors = {}
    for module, (out_features, in_features) in shapes.items():
        a_ri = _drawn(module, rank, in_features, rng_seed, spread) if directions is None else directions.get(module)
        if a_ri is None or a_ri.shape != (rank, in_features):
            found = "none" if a_ri is None else f"those of shape {list(a_ri.shape)}"
            raise ModelError(f"adapter zero needs directions [{rank}, {in_features}] for {module}, there are {found}")
        factors[module] = (a_ri, torch.zeros(out_features, rank))
    weights = AdapterWeights(
        base_model=base_name,
        revision=revision,
        rank=rank,
        alpha=worn.alpha if isinstance(worn, Lora) else float(rank),
        use_rslora=worn.use_rslora if isinstance(worn, Lora) else False,
        targets=tuple(sorted(shapes if is_narrowed else wanted or {module.rpartition(".")[2] for module in shapes})),
        factors=factors,
        fan_in_fan_out=transposed,
    )
    return write_adapter(folder, weights)


def _drawn(module: str, rank: int, in_features: int, rng_seed: int, spread: float | None) -> torch.Tensor:
    """As peft draws it, or normally with this `spread`: its gaussian."""
    a_ri = torch.empty(rank, in_features)
    if spread is not None:
        return a_ri.normal_(std=spread, generator=_generator(rng_seed, module))
    torch.nn.init.kaiming_uniform_(a_ri, a=math.sqrt(5), generator=_generator(rng_seed, module))
    return a_ri


def _generator(rng_seed: int, module: str) -> torch.Generator:
    digest = hashlib.sha256(f"adapter zero/{rng_seed}/{module}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def target_names(base_folder: Path, lora: Lora) -> tuple[str, ...]:
    """The modules of the base that a LoRA adapts, by their whole names. Raises ModelError as `write_adapter_zero` does."""
    return tuple(_target_shapes(base_folder, lora, lora.targets)[0])


def _target_shapes(
    base_folder: Path, worn: Lora | PeftAdapter, targets: tuple[str, ...] | None
) -> tuple[dict[str, tuple[int, int]], bool]:
    """(out, in) of every linear module that peft would adapt, by its name in the base; and whether one is stored [in, out].

    Without `targets` all of them but the output head."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import AutoConfig, AutoModelForCausalLM

    from chrysalis_ray.seed.linear import linear_shape, stored_transposed

    section = "lora" if isinstance(worn, Lora) else "adapter"
    try:
        config = AutoConfig.from_pretrained(base_folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the base at {base_folder} cannot be built: {error}", "give a causal language model of transformers"
        ) from error
    linear = {name: shape for name, module in model.named_modules() if (shape := linear_shape(module)) is not None}
    transposed = {name for name, module in model.named_modules() if stored_transposed(module)}
    if targets is None:
        head = model.get_output_embeddings()
        targets = tuple(sorted({name.rpartition(".")[2] for name in linear if model.get_submodule(name) is not head}))
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            leaves = sorted({name.rpartition(".")[2] for name in linear})
            raise ModelError(
                f"{section}.targets names {target!r}, the base has no such linear module", f"choose from: {', '.join(leaves)}"
            )
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # peft's own affair
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # peft corrects it module by module
        warnings.filterwarnings("ignore", message="You have passed exclude_modules")  # refused below
        try:
            adapted = get_peft_model(
                model, LoraConfig(r=1, target_modules=list(targets), task_type="CAUSAL_LM", **narrowing(worn))
            )
        except ValueError as error:
            raise ModelError(f"peft finds nothing to adapt: {error}", f"look at {section} in the blueprint") from error
    shapes = {}
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            own = name.removeprefix(PREFIX)
            if own not in linear:
                raise ModelError(f"{section}.targets reaches {own}, which is not linear", "name linear modules only")
            shapes[own] = linear[own]
    if isinstance(worn, Lora):
        _check_narrowing(worn, linear, shapes)
        _check_patterns(worn, shapes)
    return shapes, not transposed.isdisjoint(shapes)


def narrowing(worn: Lora | PeftAdapter) -> dict[str, Any]:
    """The arguments of peft's LoraConfig that leave out some of the modules that targets mean."""
    if not isinstance(worn, Lora):
        return {}
    layers = None if worn.layers is None else list(worn.layers)
    return {"exclude_modules": list(worn.exclude) or None, "layers_to_transform": layers}


def _check_narrowing(lora: Lora, linear: Mapping[str, tuple[int, int]], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Every word of `exclude` and every layer must make a difference."""
    whole = lora.model_copy(update={"exclude": (), "layers": None})
    meant = [name for name in linear if any(name == target or name.endswith(f".{target}") for target in whole.targets)]
    for out in lora.exclude:
        if not any(name == out or name.endswith(f".{out}") for name in meant):
            raise ModelError(f"lora.exclude names {out!r}, and lora.targets mean no such module", "leave it out")
    for layer in lora.layers or ():
        alone = whole.model_copy(update={"layers": (layer,)})
        if not any(alone.takes(name) for name in meant):
            raise ModelError(f"lora.layers names layer {layer}, and the base has no such targets", "layers count from 0")
    assert set(shapes) == {name for name in meant if lora.takes(name)}, "peft and this package mean the same modules"


def _check_patterns(lora: Lora, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Every key must mean a module, and no rank be larger than a matrix."""
    for field, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for key in pattern:
            if not any(means(key, name) for name in shapes):
                guess = nearest_key(key, shapes)
                raise ModelError(f"lora.{field} names {key!r}, and lora.targets mean no such module{guess}", "leave it out")
    for name, sides in shapes.items():
        if lora.patterns.rank_of(name, 1) > min(sides):
            raise ModelError(f"lora.rank_pattern gives {name} a rank above {min(sides)}, its smaller side", "write less")
