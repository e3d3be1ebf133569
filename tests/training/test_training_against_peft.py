"""A packed variant becomes what it would have become alone, trained by PEFT and torch as a user would write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_texts import LENGTH, PROJECTIONS, STEPS, TextTokens, fresh_adapter, new_pack, place_fresh, same, variant, weights

from chrysalis_ray.core.records import Variant
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.lanes import Feed
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.schedules import learning_rate_at
from chrysalis_ray.training.step import train_chunk

VARIANTS = (
    variant(0, rank=8, alpha=8.0, learning_rate=1e-3, weight_decay=0.0, clip=1.0, decay="cosine", warmup_fraction=0.0),
    variant(1, rank=4, alpha=8.0, learning_rate=3e-3, weight_decay=0.1, clip=0.5, decay="linear", warmup_fraction=0.25),
    variant(2, rank=2, alpha=32.0, learning_rate=5e-4, weight_decay=0.01, clip=0.0, decay="constant", warmup_fraction=0.1),
    variant(3, rank=6, alpha=4.0, use_rslora=True, learning_rate=2e-3, clip=0.05, beta2=0.95, warmup_fraction=0.5),
)


def train_alone(
    base: Path,
    pack: Pack,
    variant: Variant,
    tokens: TextTokens,
    dtype: torch.dtype,
    prepared: Callable[[Any], Any] = lambda model: model,
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """All steps of a variant by PEFT, full logits, torch's cross entropy, clip and AdamW, on `prepared` of the base; `settings`
    are further ones of its LoraConfig."""
    from peft import LoraConfig, get_peft_model

    hyper = variant.hyperparameters
    config = LoraConfig(
        r=hyper.rank, lora_alpha=hyper.alpha, use_rslora=hyper.use_rslora, target_modules=list(PROJECTIONS), lora_dropout=0.0,
        **settings,
    )  # fmt: skip
    model = get_peft_model(prepared(load_base(base, {torch.float32: "fp32", torch.float64: "fp64"}[dtype])), config)
    start = fresh_adapter(pack, variant.index)
    layers = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    for name, layer in layers.items():
        rank = layer.r["default"]
        layer.lora_A["default"].weight.data = start[f"weight/{name}.lora_A"][:rank].to(dtype)
        layer.lora_B["default"].weight.data = start[f"weight/{name}.lora_B"][:, :rank].clone().to(dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(parameters, betas=(hyper.beta1, hyper.beta2), eps=hyper.epsilon, weight_decay=hyper.weight_decay)
    feed = Feed(variant, tokens)
    for step in range(variant.steps):
        rows = tokens.batch(feed.step(step).rows, "train")
        adamw.param_groups[0]["lr"] = learning_rate_at(hyper, step, variant.steps)
        logits = model(
            input_ids=torch.from_numpy(rows.input_ids), position_ids=torch.from_numpy(rows.position_ids), use_cache=False
        ).logits
        loss = weighted_mean(logits, torch.from_numpy(rows.labels), [domain for domain, _ in feed.step(step).rows], variant)
        adamw.zero_grad()
        loss.backward()
        if hyper.clip:
            torch.nn.utils.clip_grad_norm_(parameters, hyper.clip)
        adamw.step()
    trained = {}
    for name, layer in layers.items():
        trained[f"weight/{name}.lora_A"] = layer.lora_A["default"].weight.data
        trained[f"weight/{name}.lora_B"] = layer.lora_B["default"].weight.data
    return trained


def weighted_mean(logits: torch.Tensor, labels: torch.Tensor, domains: list[str], variant: Variant) -> torch.Tensor:
    """Cross entropy as a user would weigh it by domain: sum of weight x loss over the sum of weights; the mean without any."""
    if not variant.epigenome.loss_weights:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    weights = torch.tensor([variant.epigenome.loss_weights.get(domain, 1.0) for domain in domains], dtype=losses.dtype)
    weights = weights[:, None] * (labels != -100)
    return (losses * weights).sum() / weights.sum()


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name].double() - right[name].double()).abs().max().item() for name in left)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("base_fixture", ["tiny_base", "tiny_untied_base"])
def test_packed_equals_separate_peft(
    base_fixture: str, dtype: torch.dtype, tolerance: float, tokens: TextTokens, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(base_fixture)
    pack = new_pack(base, len(VARIANTS), dtype=dtype)
    for slot, member in enumerate(VARIANTS):
        place_fresh(pack, slot, member)
    metrics = train_chunk(pack, range(len(VARIANTS)), tokens, STEPS)
    for slot, member in enumerate(VARIANTS):
        packed, alone = weights(pack, slot), train_alone(base, pack, member, tokens, dtype)
        # AdamW blows up the rounding of gradients that are nearly zero: PEFT in fp32 may be further from fp64 than 1e-5 itself
        exact = alone if dtype == torch.float64 else train_alone(base, pack, member, tokens, torch.float64)
        as_exact = dtype == torch.float32 and largest_difference(packed, exact) <= largest_difference(alone, exact)
        assert largest_difference(packed, alone) <= tolerance or as_exact
        fresh = fresh_adapter(pack, member.index)
        start = {name: fresh[name][: value.shape[0], : value.shape[1]] for name, value in packed.items()}
        assert largest_difference(packed, start) > 1e-3
        assert metrics[slot].tokens == STEPS * 2 * LENGTH


def test_accumulation_over_micro_steps_is_one_big_step(tiny_base: Path, tokens: TextTokens) -> None:
    whole, parts = (new_pack(tiny_base, 2, dtype=torch.float64) for _ in range(2))
    for pack, rows in ((whole, 2), (parts, 1)):
        for slot in range(2):
            place_fresh(pack, slot, VARIANTS[slot])
        train_chunk(pack, [0, 1], tokens, 5, rows_per_microstep=rows)
    for slot in range(2):
        assert largest_difference(weights(whole, slot), weights(parts, slot)) <= 1e-12


def weighing(member: Variant, **weights: float) -> Variant:
    return replace(member, epigenome=replace(member.epigenome, loss_weights=weights), rows_per_step=3)


@pytest.mark.parametrize("rows_per_microstep", [3, 2])
def test_loss_weights_reach_every_token_of_the_packed_loss(
    rows_per_microstep: int, tiny_base: Path, tokens: TextTokens
) -> None:
    members = [
        weighing(VARIANTS[0], prose=5.0),
        weighing(VARIANTS[1], code=0.25, prose=2.0),
        replace(VARIANTS[2], rows_per_step=3),
    ]
    pack = new_pack(tiny_base, 3, dtype=torch.float64)
    for slot, member in enumerate(members):
        place_fresh(pack, slot, member)
    assert any(len(set(Feed(members[0], tokens).step(n).token_weights())) > 1 for n in range(STEPS)), "no step of two domains"
    train_chunk(pack, [0, 1, 2], tokens, STEPS, rows_per_microstep=rows_per_microstep)
    for slot, member in enumerate(members):
        assert largest_difference(weights(pack, slot), train_alone(tiny_base, pack, member, tokens, torch.float64)) <= 1e-12
    unweighted = train_alone(tiny_base, pack, weighing(VARIANTS[0]), tokens, torch.float64)
    assert largest_difference(weights(pack, 0), unweighted) > 1e-4


def test_only_the_ratios_of_loss_weights_matter(tiny_base: Path, tokens: TextTokens) -> None:
    plain, same_for_all, apart = (
        weighing(VARIANTS[0]),
        weighing(VARIANTS[0], code=4.0, prose=4.0),
        weighing(VARIANTS[0], code=1.0, prose=4.0),
    )
    trained = []
    for member in (plain, same_for_all, apart):
        pack = new_pack(tiny_base, 1)
        place_fresh(pack, 0, member)
        train_chunk(pack, [0], tokens, 4)
        trained.append(weights(pack, 0))
    assert same(trained[0], trained[1])  # bit for bit
    assert not same(trained[0], trained[2])
