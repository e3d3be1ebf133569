"""What a variant that trains alone, by plain peft, takes beyond a packed one. Plain arithmetic, no torch; it errs upwards."""

from __future__ import annotations

from chrysalis_ray.config.blueprint import MOVED_INITS, Lora
from chrysalis_ray.training.shapes import ModelShape

# What the backward pass keeps of a token, in units of a packed variant: counted from autograd's saved tensors, on a Qwen3 in
# fp32 (24.2 and 10.7 KiB per layer where a pack keeps 8.2). On a bf16 base peft keeps a copy in fp32 of whatever A reads.
DORA_KEEPS, SAVED_KEEP, BF16_KEEPS = 3.0, 1.4, 1.5
TABLES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")
NORMS_OF_A_LAYER = 4


def solo_parameters(shape: ModelShape, lora: Lora) -> int:
    """Parameters that are trained beside A and B."""
    sides = shape.linears()
    beside = (lora.use_dora + lora.lora_bias) * shape.layers * sum(sides[t][1] for t in lora.targets if t in sides)
    return beside + sum(_saved(shape, name) for name in lora.modules_to_save)


def _saved(shape: ModelShape, name: str) -> int:
    leaf = name.rpartition(".")[2]
    if leaf in TABLES:
        return shape.embedding_parameters
    if "norm" in leaf or leaf.startswith("ln"):
        return (NORMS_OF_A_LAYER * shape.layers + 1) * shape.hidden
    return shape.layers * shape.layer_parameters


def kept_activations(lora: Lora, precision: str | None) -> float:
    """What is kept for the backward pass, in units of a packed variant; 1 for one that is packed."""
    if lora.solo is None:
        return 1.0
    kind = DORA_KEEPS if lora.use_dora else SAVED_KEEP if lora.modules_to_save else 1.0
    return kind * (BF16_KEEPS if precision == "bf16" else 1.0)


def twice_held(shape: ModelShape, lora: Lora) -> int:
    """Parameters of the base that are held a second time, so that a moved base can be had back."""
    if lora.init not in MOVED_INITS:
        return 0
    sides = shape.linears()
    return shape.layers * sum(inner * outer for target in lora.targets if target in sides for inner, outer in [sides[target]])
