"""In bf16 a packed variant is as close to fp32 as a variant that plain PEFT trains alone in bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import SUPPORTED, Family, write_family
from training_texts import TextTokens, fresh_adapter, variant, weights

from chrysalis_ray.core.records import Variant
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.lanes import Feed
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.schedules import learning_rate_at
from chrysalis_ray.training.step import train_chunk

STEPS = 8
VARIANTS = [variant(i, rank=(8, 4, 2, 6)[i], learning_rate=1e-3 * (1 + i % 2), epsilon=1e-6) for i in range(4)]
Tensors = dict[str, torch.Tensor]


def packed(folder: Path, family: Family) -> Pack:
    pack = Pack(load_base(folder, "bf16"), family.targets, 4, 8, make_engine(0, "none", "bf16", "cpu"))
    for slot, member in enumerate(VARIANTS):
        pack.place(slot, member, fresh_adapter(pack, member.index), {"optimizer_step": 0})
    return pack


def alone(folder: Path, family: Family, start: Tensors, member: Variant, tokens: TextTokens, precision: str) -> Tensors:
    """PEFT keeps its adapters in fp32 beside a base in bf16, as packs do."""
    from peft import LoraConfig, get_peft_model

    hyper = member.hyperparameters
    config = LoraConfig(r=hyper.rank, lora_alpha=hyper.alpha, target_modules=list(family.targets))
    model = get_peft_model(load_base(folder, precision), config)
    layers = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    for name, layer in layers.items():
        layer.lora_A["default"].weight.data.copy_(start[f"weight/{name}.lora_A"][: hyper.rank])
        layer.lora_B["default"].weight.data.copy_(start[f"weight/{name}.lora_B"][:, : hyper.rank])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    adamw = torch.optim.AdamW(parameters, eps=hyper.epsilon, weight_decay=hyper.weight_decay)
    feed = Feed(member, tokens)  # type: ignore[arg-type]
    for step in range(STEPS):
        rows = tokens.batch(feed.step(step).rows, "train")
        adamw.param_groups[0]["lr"] = learning_rate_at(hyper, step, member.steps)
        ids, positions = torch.from_numpy(rows.input_ids), torch.from_numpy(rows.position_ids)
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(rows.labels).flatten())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, hyper.clip)
        adamw.step()
    return {
        f"weight/{name}.lora_{side}": getattr(layer, f"lora_{side}")["default"].weight.data
        for name, layer in layers.items()
        for side in "AB"
    }


def squared_distance(left: Tensors, right: Tensors) -> float:
    assert left.keys() == right.keys()
    return sum((left[name].double() - right[name].double()).square().sum().item() for name in left)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_pack_in_bf16_rounds_no_more_than_peft_alone(name: str, tiny_base: Path, tokens: TextTokens, tmp_path: Path) -> None:
    """Over all four variants together: what rounding does to one of them is a single draw, within a fifth either way."""
    family = SUPPORTED[name]
    folder = write_family(family.config(), tmp_path / name, tiny_base)
    pack = packed(folder, family)
    starts = [fresh_adapter(pack, member.index) for member in VARIANTS]
    train_chunk(pack, range(4), tokens, STEPS)  # type: ignore[arg-type]
    ours = theirs = 0.0
    for slot, member in enumerate(VARIANTS):
        exact = alone(folder, family, starts[slot], member, tokens, "fp32")
        ours += squared_distance(weights(pack, slot), exact)
        theirs += squared_distance(alone(folder, family, starts[slot], member, tokens, "bf16"), exact)
    assert 0.0 < ours**0.5 <= 1.1 * theirs**0.5
