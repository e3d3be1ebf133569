"""What a variant that trains alone, by plain peft, takes beyond a packed one. Plain arithmetic, no torch; it errs upwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from chrysalis_ray.config.adapters import AdaLora, PeftAdapter
from chrysalis_ray.config.blueprint import MOVED_INITS, Blueprint, Lora
from chrysalis_ray.training.planning.shapes import ModelShape

# What the backward pass keeps of a token, in units of a packed variant: counted from autograd's saved tensors, on a Qwen3 in
# fp32 (24.2 and 10.7 KiB per layer where a pack keeps 8.2). On a bf16 base peft keeps a copy in fp32 of whatever A reads.
DORA_KEEPS, SAVED_KEEP, BF16_KEEPS = 3.0, 1.4, 1.5
TABLES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")
NORMS_OF_A_LAYER = 4

# Parameters of one target [in, out] for adapters of other kinds than LoRA, of a rank.
_Count = Callable[[Any, int, int, int], float]
KINDS: dict[str, _Count] = {
    "adalora": lambda of, rank, inner, outer: rank * (inner + outer + 1),
    "ia3": lambda of, rank, inner, outer: max(inner, outer),
    "loha": lambda of, rank, inner, outer: 2 * rank * (inner + outer),
    "lokr": lambda of, rank, inner, outer: inner * outer / 4,  # the larger factor whole: 4 is the least that it is parted by
    "vera": lambda of, rank, inner, outer: rank + outer,
    "oft": lambda of, rank, inner, outer: inner * (of.oft_block_size - 1) / 2,
    "boft": lambda of, rank, inner, outer: inner * (of.boft_block_size or inner / of.boft_block_num) + outer,
    "hra": lambda of, rank, inner, outer: rank * inner,
    "miss": lambda of, rank, inner, outer: rank * max(inner, outer),
    "fourierft": lambda of, rank, inner, outer: of.n_frequency,
    "road": lambda of, rank, inner, outer: 4 * outer,
    "delora": lambda of, rank, inner, outer: rank * (inner + outer) + 1,
}
# Kinds that make whole matrices of their targets, and how many the backward pass keeps of each.
DENSE = {"loha": 3, "lokr": 2, "boft": 4, "hra": 4, "fourierft": 2, "delora": 2, "oft": 2}
# What AdaLoRA remembers of every number that it trains, and works with.
REMEMBERED = 4
# What a token leaves beside, in units of a packed variant: what the other kinds keep of what their targets read and give.
KIND_KEEPS = 2.0


def adapter_parameters(shape: ModelShape, blueprint: Blueprint, rank: int) -> int:
    """Parameters of one variant of this rank: all that its optimizer moves."""
    worn = blueprint.worn
    if isinstance(worn, Lora):
        return shape.lora_parameters(rank, worn.targets, worn.layers, worn.patterns) + _beside(shape, worn)
    saved = sum(_saved(shape, name) for name in worn.modules_to_save)
    if not worn.linear:
        return saved + sum(_saved(shape, name) for name in worn.targets or ())
    count = KINDS[blueprint.adapter_type]
    return saved + shape.layers * math.ceil(sum(count(worn, rank, inner, outer) for inner, outer in _sides(shape, worn)))


def _beside(shape: ModelShape, lora: Lora) -> int:
    """What is trained beside A and B."""
    vectors = (lora.use_dora + lora.lora_bias) * shape.layers * sum(outer for _, outer in _sides(shape, lora))
    return vectors + sum(_saved(shape, name) for name in lora.modules_to_save)


def _sides(shape: ModelShape, worn: Lora | PeftAdapter) -> list[tuple[int, int]]:
    """(in, out) of the targets of a layer."""
    sides, leaves = shape.linears(), {target.rpartition(".")[2] for target in worn.targets or ()}
    return [sides[leaf] for leaf in sorted(leaves) if leaf in sides]


def _saved(shape: ModelShape, name: str) -> int:
    leaf = name.rpartition(".")[2]
    if leaf in TABLES:
        return shape.embedding_parameters
    if "norm" in leaf or leaf.startswith("ln"):
        return (NORMS_OF_A_LAYER * shape.layers + 1) * shape.hidden
    return shape.layers * shape.layer_parameters


def kept_activations(worn: Lora | PeftAdapter, precision: str | None) -> float:
    """What is kept of a token for the backward pass, in units of a packed variant; 1 for one that is packed."""
    if worn.solo is None:
        return 1.0
    kind = KIND_KEEPS
    if isinstance(worn, Lora):
        kind = DORA_KEEPS if worn.use_dora else SAVED_KEEP if worn.modules_to_save else 1.0
    return kind * (BF16_KEEPS if precision == "bf16" else 1.0)


def held_beside(shape: ModelShape, blueprint: Blueprint) -> int:
    """Numbers the size of targets that are held beside the base: those of a base that is moved, so that it can be had back,
    and those that some kinds make of their targets and keep for the backward pass."""
    worn = blueprint.worn
    if isinstance(worn, AdaLora):
        return REMEMBERED * adapter_parameters(shape, blueprint, blueprint.rank)
    copies = int(worn.init in MOVED_INITS) if isinstance(worn, Lora) else DENSE.get(blueprint.adapter_type, 0)
    return copies * shape.layers * sum(inner * outer for inner, outer in _sides(shape, worn))
