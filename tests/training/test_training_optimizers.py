"""Optimizer classes, LoRA+, LoRA-FA and dropout side by side in one pack, each as PEFT and torch do it for one adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import transformers.optimization as hf
from training_texts import (
    PROJECTIONS,
    STEPS,
    TextTokens,
    distance,
    fresh_adapter,
    new_pack,
    place_fresh,
    same,
    variant,
    weights,
)

from chrysalis_ray.config.blueprint import Decay, OptimizerType
from chrysalis_ray.core.records import MOMENTS, Hyperparameters, Variant
from chrysalis_ray.seed.soul import pack_seed, unpack_seed
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.dropout import Dropout, LaneMask
from chrysalis_ray.training.lanes import Feed
from chrysalis_ray.training.optimizer import RECIPES, SlotOptimizer
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.schedules import learning_rate_at
from chrysalis_ray.training.step import train_chunk

TRAINED = 6
SETTINGS: tuple[dict[str, object], ...] = (
    *({"optimizer": kind, "weight_decay": 0.05, "clip": 0.5} for kind in RECIPES),
    {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.1},
    {"plus_ratio": 16.0, "weight_decay": 0.1},
    {"plus_ratio": 4.0, "optimizer": "nadam", "decay": "wsd", "decay_fraction": 0.8},
    {"freeze_a": True, "weight_decay": 0.1, "clip": 0.05},
    {"freeze_a": True, "plus_ratio": 2.0, "optimizer": "adagrad", "final_fraction": 0.3},
    {"dropout": 0.1, "clip": 0.1},
    {"dropout": 0.5, "optimizer": "rmsprop", "plus_ratio": 3.0, "use_rslora": True},
)


def members() -> list[Variant]:
    return [variant(index, rank=(8, 4, 2, 6)[index % 4], **settings) for index, settings in enumerate(SETTINGS)]


def full_pack(base: Path, **options: object) -> Pack:
    pack = new_pack(base, len(SETTINGS), **options)  # type: ignore[arg-type]
    for slot, member in enumerate(members()):
        place_fresh(pack, slot, member)
    return pack


class SameMasks(torch.nn.Module):
    """In the place of an nn.Dropout of peft."""

    def __init__(self, name: str, member: Variant) -> None:
        super().__init__()
        self.name, self.member, self.step = name, member, 0

    def forward(self, x_bti: torch.Tensor) -> torch.Tensor:
        drawn = Dropout(self.member.hyperparameters.dropout, self.member.rng_seed, self.step)
        mask = LaneMask(drawn, tuple(range(len(x_bti))), len(x_bti))
        return x_bti * mask.noise(self.name, x_bti.flatten(0, 1)).view(x_bti.shape)


def peft_optimizer(model: torch.nn.Module, hyper: Hyperparameters) -> torch.optim.Optimizer:
    """With a learning rate of 1 for A; peft's own recipe where B learns faster."""
    from peft.optimizers import create_loraplus_optimizer

    recipe = RECIPES[hyper.optimizer]
    settings = recipe.settings(hyper)
    if hyper.plus_ratio == 1.0:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return recipe.make(trained, lr=1.0, weight_decay=hyper.weight_decay, **settings)
    return create_loraplus_optimizer(
        model,  # type: ignore[arg-type]
        recipe.make,  # type: ignore[arg-type]
        lr=1.0,
        loraplus_lr_ratio=hyper.plus_ratio,
        loraplus_weight_decay=hyper.weight_decay,
        **settings,
    )


def train_alone(base: Path, pack: Pack, member: Variant, tokens: TextTokens) -> dict[str, torch.Tensor]:
    """PEFT in fp64, with an optimizer over one parameter per matrix."""
    from peft import LoraConfig, get_peft_model

    hyper = member.hyperparameters
    config = LoraConfig(r=hyper.rank, lora_alpha=hyper.alpha, use_rslora=hyper.use_rslora, target_modules=list(PROJECTIONS))  # type: ignore[arg-type]
    model = get_peft_model(load_base(base, "fp64"), config)
    start = fresh_adapter(pack, member.index)
    layers = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    for name, layer in layers.items():
        a_ri, b_or = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a_ri.data = start[f"weight/{name}.lora_A"][: hyper.rank].double()
        b_or.data = start[f"weight/{name}.lora_B"][:, : hyper.rank].clone().double()
        a_ri.requires_grad_(not hyper.freeze_a)
        layer.lora_dropout["default"] = SameMasks(name, member) if hyper.dropout else torch.nn.Identity()
    optimizer = peft_optimizer(model, hyper)
    factors = [group["lr"] for group in optimizer.param_groups]
    feed = Feed(member, tokens)
    for step in range(TRAINED):
        for layer in layers.values():
            layer.lora_dropout["default"].step = step
        rows = tokens.batch(feed.step(step).rows, "train")
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = factor * learning_rate_at(hyper, step, member.steps)
        inputs = {"input_ids": torch.from_numpy(rows.input_ids), "position_ids": torch.from_numpy(rows.position_ids)}
        logits = model(**inputs, use_cache=False).logits
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(rows.labels).flatten()).backward()
        if hyper.clip:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], hyper.clip)
        optimizer.step()
    trained = {f"weight/{name}.lora_A": layer.lora_A["default"].weight.data for name, layer in layers.items()}
    return trained | {f"weight/{name}.lora_B": layer.lora_B["default"].weight.data for name, layer in layers.items()}


def test_all_recipes_in_one_pack_equal_separate_peft(tiny_base: Path, tokens: TextTokens) -> None:
    pack = full_pack(tiny_base, dtype=torch.float64)
    train_chunk(pack, range(len(SETTINGS)), tokens, TRAINED)
    for slot, member in enumerate(members()):
        packed, alone = weights(pack, slot), train_alone(tiny_base, pack, member, tokens)
        fresh = fresh_adapter(pack, member.index)
        start = {name: fresh[name][: value.shape[0], : value.shape[1]].double() for name, value in packed.items()}
        error = max((packed[name] - alone[name]).abs().max().item() for name in packed)
        print(slot, SETTINGS[slot], f"{error:.1e}, moved {distance(packed, start):.1e}")
        assert error <= 1e-12, SETTINGS[slot]
        assert any(not torch.equal(packed[name], start[name]) for name in packed if name.endswith("lora_B"))
        frozen = [torch.equal(packed[name], start[name]) for name in packed if name.endswith("lora_A")]
        assert all(frozen) if member.hyperparameters.freeze_a else not any(frozen)


@pytest.mark.parametrize("threads", [1, 2])
def test_every_recipe_goes_on_from_its_seed_in_another_slot_bit_for_bit(
    threads: int, tiny_base: Path, tokens: TextTokens
) -> None:
    count = len(SETTINGS)
    whole, first, second = (full_pack(tiny_base, lanes="fixed", threads=threads) for _ in range(3))
    train_chunk(whole, range(count), tokens, 3)
    expected = train_chunk(whole, range(count), tokens, 3)
    train_chunk(first, range(count), tokens, 3)
    for slot, member in enumerate(members()):
        tensors, meta = unpack_seed(pack_seed(*first.harvest(slot)))
        assert {name.partition("/")[0] for name in tensors} - {"weight"} <= set(MOMENTS[member.hyperparameters.optimizer])
        second.place(count - 1 - slot, member, tensors, meta)
    metrics = train_chunk(second, range(count)[::-1], tokens, 3)
    assert metrics == expected
    for slot in range(count):
        assert same(whole.harvest(slot)[0], second.harvest(count - 1 - slot)[0]), SETTINGS[slot]
        assert whole.harvest(slot)[1] == second.harvest(count - 1 - slot)[1]


def test_moving_in_the_bank_and_cloning_lose_nothing(tiny_base: Path, tokens: TextTokens) -> None:
    count = len(SETTINGS)
    calm, moved = (full_pack(tiny_base, dtype=torch.float64) for _ in range(2))
    for _ in range(2):
        train_chunk(calm, range(count), tokens, 2)
    train_chunk(moved, range(count), tokens, 2)
    train_chunk(moved, range(count)[::-2], tokens, 2)
    train_chunk(moved, range(count)[-2::-2], tokens, 2)
    assert all(distance(calm.harvest(slot)[0], moved.harvest(slot)[0]) <= 1e-12 for slot in range(count))
    for slot in range(0, count - 1, 2):
        moved.clone(slot, slot + 1, moved.occupant(slot).variant)
        assert same(moved.harvest(slot)[0], moved.harvest(slot + 1)[0])
        assert moved.harvest(slot)[1] == moved.harvest(slot + 1)[1]


def test_moments_stay_with_their_class() -> None:
    torch.manual_seed(0)
    row, gradient = torch.randn(128), torch.randn(128)
    plain, split = (SlotOptimizer(Hyperparameters(), row.clone(), gradient, 64) for _ in range(2))
    for optimizer in (plain, split):
        optimizer.step(1e-2)
        optimizer.step(1e-2)
    before = {name: moment.clone() for name, moment in split.moments().items()}
    split.configure(Hyperparameters(plus_ratio=2.0))
    assert same(split.moments(), before)
    assert split.updates == 2
    split.configure(Hyperparameters(plus_ratio=1.0))
    for optimizer in (plain, split):
        optimizer.step(1e-2)
    assert same(plain.moments(), split.moments())
    split.configure(Hyperparameters(optimizer="rmsprop"))
    assert (split.updates, split.moments()) == (0, {})
    split.step(1e-2)
    assert set(split.moments()) == {"square_avg"}


def test_the_tables_of_optimizers_agree() -> None:
    assert set(RECIPES) == set(MOMENTS) == set(get_args(OptimizerType))
    for kind, names in MOMENTS.items():
        optimizer = SlotOptimizer(Hyperparameters(optimizer=kind), torch.ones(64), torch.ones(64), 0)
        optimizer.step(1e-3)
        assert set(optimizer.moments()) == set(names)
        (state,) = optimizer._torch.state.values()
        assert set(state) - {"step"} == set(names) | set(RECIPES[kind].scalars)


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(("decay", "floor"), [
    ("constant", 0.0), ("linear", 0.0), ("linear", 0.2), ("cosine", 0.0), ("cosine", 0.1), ("wsd", 0.0), ("wsd", 0.1),
])  # fmt: skip
def test_every_step_of_every_schedule_is_that_of_transformers(decay: str, floor: float, warmup: int) -> None:
    total, peak = 20, 0.5
    ours = Hyperparameters(
        learning_rate=peak, decay=decay, warmup_fraction=warmup / total, final_fraction=floor, decay_fraction=0.4
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=peak)
    theirs = {
        "constant": lambda: hf.get_constant_schedule_with_warmup(optimizer, warmup),
        "linear": lambda: (
            hf.get_polynomial_decay_schedule_with_warmup(optimizer, warmup, total, lr_end=floor * peak, power=1.0)
            if floor
            else hf.get_linear_schedule_with_warmup(optimizer, warmup, total)
        ),
        "cosine": lambda: (
            hf.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, total, min_lr_rate=floor)
            if floor
            else hf.get_cosine_schedule_with_warmup(optimizer, warmup, total)
        ),
        "wsd": lambda: hf.get_wsd_schedule(optimizer, warmup, 8, num_training_steps=total, min_lr_ratio=floor),
    }[decay]()
    rates = []
    for _ in range(total + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    for step in range(warmup):  # theirs begins at zero, or at the floor; ours is one step ahead
        assert learning_rate_at(ours, step, total) == pytest.approx(peak * (step + 1) / warmup)
        if not (decay == "wsd" and floor):
            assert learning_rate_at(ours, step, total) == pytest.approx(rates[step + 1], rel=1e-12)
    for step in range(warmup, total + 1):
        assert learning_rate_at(ours, step, total) == pytest.approx(rates[step], rel=1e-12, abs=1e-15)
    end = learning_rate_at(ours, total, total)
    assert learning_rate_at(ours, total + 5, total) == end  # where the cosine of transformers would rise again


def test_decays_are_those_of_the_blueprint() -> None:
    for decay in get_args(Decay):
        assert learning_rate_at(Hyperparameters(decay=decay), 0, STEPS) > 0.0
    assert replace(Hyperparameters(), decay="wsd").decay_fraction == 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "stock"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_the_kernel_alone_gives_the_bits_of_the_stock_class(kind: str, stock: type, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    hyper = Hyperparameters(optimizer=kind, weight_decay=0.05, beta1=0.8, beta2=0.97, epsilon=1e-7)
    row, gradient = torch.randn(256, dtype=dtype), torch.empty(256, dtype=dtype)
    ours = SlotOptimizer(hyper, row.clone(), gradient, 128)
    parameter = torch.nn.Parameter(row.clone())
    theirs = stock([parameter], weight_decay=0.05, betas=(0.8, 0.97), eps=1e-7, fused=True)
    for number in range(5):
        gradient.copy_(torch.randn(256, dtype=dtype) * 10.0 ** -(2 * number))
        parameter.grad, rate = gradient.clone(), 0.01 / (number + 1)
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        ours.step(rate)
    assert torch.equal(ours._row_P, parameter)
    assert same(ours.moments(), {name: theirs.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")})
    assert ours._torch.state[ours._parameters[0]]["step"] == theirs.state[parameter]["step"] == 5
