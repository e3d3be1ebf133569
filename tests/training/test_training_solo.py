"""What no pack can hold trains as plain PEFT would train it, is resumed to the bit, and is left as a folder that PEFT loads."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from training_texts import PROJECTIONS, TextTokens, new_pack, variant, weights

from chrysalis_ray.config.blueprint import Lora
from chrysalis_ray.core.errors import MergeError, ModelError
from chrysalis_ray.core.records import Variant
from chrysalis_ray.seed.adapter import AdapterWeights, read_adapter, write_adapter
from chrysalis_ray.seed.solo import read_solo, release_adapter, write_solo
from chrysalis_ray.seed.soul import pack_seed, unpack_seed
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.engine import ReplicatedEngine
from chrysalis_ray.training.lanes import Feed
from chrysalis_ray.training.schedules import learning_rate_at
from chrysalis_ray.training.solo import SoloPack
from chrysalis_ray.training.step import train_chunk
from chrysalis_ray.training.trunk import checkpoint_activations

STEPS = 8
PRECISIONS = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16"}
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "norms": {"modules_to_save": ("norm", "input_layernorm")},
    "head": {"modules_to_save": ("lm_head", "embed_tokens"), "use_dora": True},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
}
EXACT = ("dora", "bias", "norms", "head")  # peft moves a base in fp32 alone


def solo(base: Path, kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> SoloPack:
    model = load_base(base, PRECISIONS[dtype])
    if options.pop("recompute", False):
        checkpoint_activations(model)
    lora = Lora(targets=PROJECTIONS, **KINDS.get(kind, {}))
    rows = torch.float64 if dtype == torch.float64 else torch.float32
    return SoloPack(model, lora, ReplicatedEngine(torch.device("cpu"), **options), dtype=rows)


def member(index: int = 0, **changes: Any) -> Variant:
    return variant(index, **{"rank": 4, "learning_rate": 1e-3, "weight_decay": 0.1, "clip": 0.5, "epsilon": 1e-4, **changes})


def zero_of(base: Path) -> dict[str, torch.Tensor]:
    """Adapter zero of rank 8: A is drawn, B is zero."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, module in load_base(base, "fp32").named_modules():
        if name.endswith(PROJECTIONS):
            out_features, in_features = module.weight.shape  # type: ignore[union-attr, misc]
            tensors[f"weight/{name}.lora_A"] = torch.randn(8, in_features, generator=generator) / in_features**0.5  # type: ignore[operator]
            tensors[f"weight/{name}.lora_B"] = torch.zeros(out_features, 8)  # type: ignore[arg-type]
    return tensors


def by_plain_peft(base: Path, kind: str, own: Variant, tokens: TextTokens, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The model, and its state, after all steps of a loop that a user of peft would write."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    hyper, settings = own.hyperparameters, dict(KINDS[kind])
    config = LoraConfig(
        r=hyper.rank, lora_alpha=hyper.alpha, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM",  # type: ignore[arg-type]
        init_lora_weights=settings.pop("init", True), **{k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()},
    )  # fmt: skip
    model = get_peft_model(load_base(base, PRECISIONS[dtype]), config).eval()
    if kind not in ("pissa", "olora"):
        zero = zero_of(base)
        for name, layer in model.named_modules():
            if hasattr(layer, "lora_A"):
                a_ri = zero[f"weight/{name.removeprefix('base_model.model.')}.lora_A"][: hyper.rank]
                layer.lora_A["default"].weight.data = a_ri.to(dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(parameters, eps=hyper.epsilon, weight_decay=hyper.weight_decay)
    feed = Feed(own, tokens)
    for step in range(STEPS):
        rows = tokens.batch(feed.step(step).rows, "train")
        adamw.param_groups[0]["lr"] = learning_rate_at(hyper, step, own.steps)
        logits = model(
            input_ids=torch.from_numpy(rows.input_ids), position_ids=torch.from_numpy(rows.position_ids), use_cache=False
        ).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(rows.labels).flatten())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, hyper.clip)
        adamw.step()
    return model, {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}


def base_of(kind: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("tiny_untied_base" if kind == "head" else "tiny_base")


@pytest.mark.parametrize("kind", KINDS)
def test_a_solo_variant_is_what_plain_peft_makes_of_it(kind: str, tokens: TextTokens, request: pytest.FixtureRequest) -> None:
    base, dtype = base_of(kind, request), torch.float64 if kind in EXACT else torch.float32
    pack = solo(base, kind, dtype)
    pack.place(0, member(), zero_of(base), {"optimizer_step": 0})
    start = weights(pack, 0)
    metrics = train_chunk(pack, [0], tokens, STEPS)  # type: ignore[arg-type]
    _, alone = by_plain_peft(base, kind, member(), tokens, dtype)
    mine = {name.removeprefix("weight/"): tensor for name, tensor in weights(pack, 0).items()}
    assert mine.keys() == alone.keys()
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for name, tensor in alone.items():
        assert (mine[name] - tensor).abs().max().item() <= tolerance, name
        moved = (mine[name] - start[f"weight/{name}"]).abs().max().item()
        assert moved > 1e-4, name  # all of it was trained
    assert metrics[0].train_loss is not None
