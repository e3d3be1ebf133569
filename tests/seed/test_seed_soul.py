"""Seeds as bytes: the same seed gives the same bytes, and nothing wrong gets in or out."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save

from chrysalis_ray.core.errors import StoreCorrupt, VariantLost
from chrysalis_ray.core.records import MOMENTS
from chrysalis_ray.seed.soul import pack_seed, unpack_seed

META = {
    "variant_id": "v07",
    "position": 3,
    "step": 12,
    "hyperparameters": {"learning_rate": 0.1},
    "epigenome": {"express": {"ä": 1.5}},
}


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        f"{kind}/model.layers.{layer}.q_proj.lora_{side}": torch.rand(shape, generator=generator, dtype=dtype)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for layer in (0, 10)
        for side, shape in (("A", (2, 5)), ("B", (7, 2)))
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_seed_comes_back_bit_for_bit(dtype):
    content = pack_seed(tensors(dtype), META)
    assert content == pack_seed(dict(reversed(tensors(dtype).items())), dict(reversed(META.items())))
    back, meta = unpack_seed(content)
    assert meta == META
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors(dtype).items())
    assert pack_seed(back, meta) == content


def test_rows_of_one_bank_can_be_packed():
    bank = torch.rand(3, 40)
    views = {"weight/q.lora_A": bank[1, :10].view(2, 5), "weight/q.lora_B": bank[1, 10:24].view(7, 2)}
    assert torch.equal(unpack_seed(pack_seed(views, {}))[0]["weight/q.lora_B"], views["weight/q.lora_B"])


def test_what_diverged_is_a_lost_variant():
    sick = tensors()
    sick["exp_avg/model.layers.0.q_proj.lora_A"][0, 0] = float("nan")
    with pytest.raises(VariantLost, match="v07"):
        pack_seed(sick, META)
    with pytest.raises(VariantLost, match="v07"):
        pack_seed(tensors(), {**META, "loss": float("inf")})


@pytest.mark.parametrize("change", [
    {"weight/q.lora_A.extra": torch.ones(2, 5)}, {"weight/../q.lora_A": torch.ones(2, 5)},
    {"weight/q.lora_A": torch.ones(2, 5)},
    {"exp_avg/model.layers.0.q_proj.lora_A": torch.ones(3, 5)},
    {"weight/model.layers.0.q_proj.lora_A": torch.ones(2, 5).half()},
    {"exp_avg/q.lora_A": torch.ones(2, 5)}, {"momentum/q.lora_A": torch.ones(2, 5)},
], ids=str)  # fmt: skip
def test_keys_and_shapes_are_those_of_a_seed(change):
    wrong = {**tensors(), **change}
    with pytest.raises(ValueError):
        pack_seed(wrong, META)
    foreign = save(
        {name: tensor.contiguous() for name, tensor in wrong.items()}, {"seed": '{"format":"chrysalis.seed/1","meta":{}}'}
    )
    with pytest.raises(StoreCorrupt):
        unpack_seed(foreign)


@pytest.mark.parametrize("kind", MOMENTS)
def test_every_class_keeps_its_own_moments_and_no_others(kind):
    weights = {name: tensor for name, tensor in tensors().items() if name.startswith("weight/")}
    full = dict(weights)
    for moment in MOMENTS[kind]:
        full |= {name.replace("weight/", f"{moment}/"): tensor + 1 for name, tensor in weights.items()}
    back, meta = unpack_seed(pack_seed(full, {**META, "optimizer": kind, "scalars": {"mu_product": 0.25}}))
    assert back.keys() == full.keys()
    assert meta["scalars"] == {"mu_product": 0.25}
    assert unpack_seed(pack_seed(weights, {"optimizer": kind}))[0].keys() == weights.keys()
    other = next(name for name in MOMENTS if set(MOMENTS[name]) != set(MOMENTS[kind]))
    with pytest.raises(ValueError, match="moments"):
        pack_seed(full, {"optimizer": other})


def test_an_unknown_optimizer_is_refused():
    for wrong in ("lion", 3, None, ["adamw"]):
        with pytest.raises(ValueError, match="optimizer"):
            pack_seed(tensors(), {"optimizer": wrong})


def test_a_seed_of_the_first_format_opens():
    content = save(tensors(), {"seed": '{"format":"chrysalis.seed/1","meta":{"optimizer_step":4,"updates":3}}'})
    back, meta = unpack_seed(content)
    assert meta == {"optimizer_step": 4, "updates": 3}
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors().items())
    odd = {name.replace("exp_avg_sq/", "exp_inf/"): tensor for name, tensor in tensors().items()}
    with pytest.raises(StoreCorrupt, match="exp_inf"):
        unpack_seed(save(odd, {"seed": '{"format":"chrysalis.seed/1","meta":{"optimizer":"adamax"}}'}))


@pytest.mark.parametrize("newer", ['"patterns":{"ranks":{"q_proj":2}}', '"patterns":{}', '"solo":{"type":"loha"}'])
def test_a_seed_of_the_first_format_says_nothing_that_came_later(newer):
    with pytest.raises(StoreCorrupt, match=r"format 1 has no (patterns|solo)"):
        unpack_seed(save(tensors(), {"seed": f'{{"format":"chrysalis.seed/1","meta":{{{newer}}}}}'}))


@pytest.mark.parametrize("patterns", [
    {"ranks": {"q_proj": True}}, {"ranks": {"other": 0}}, {"ranks": {"other": 2.0}}, {"alphas": {"q_proj": "x"}},
    {"alphas": {"q_proj": -1.0}}, {"alphas": {"q_proj": None}}, {"alphas": {}}, {"scales": {"q_proj": 2}}, None,
], ids=str)  # fmt: skip
def test_patterns_that_nobody_wrote_are_refused(patterns):
    with pytest.raises(ValueError, match="patterns"):
        pack_seed(tensors(), {**META, "patterns": patterns})


def test_one_moment_alone_is_refused():
    with pytest.raises(ValueError, match="exp_avg_sq"):
        pack_seed({name: t for name, t in tensors().items() if name != "exp_avg_sq/model.layers.0.q_proj.lora_A"}, META)
    with pytest.raises(ValueError, match="moment"):
        pack_seed({name: t for name, t in tensors().items() if not name.startswith("exp_avg_sq/")}, META)


@pytest.mark.parametrize("metadata", [
    None, {"seed": "null"}, {"seed": "{"}, {"seed": "[1]"}, {"seed": '{"format":"other/1","meta":{}}'}, {"format": "pt"},
    {"seed": '{"format":"chrysalis.seed/1","format":"chrysalis.seed/1","meta":{}}'}, {"seed": '{"format":"chrysalis.seed/1"}'},
], ids=str)  # fmt: skip
def test_foreign_metadata_is_refused(metadata):
    with pytest.raises(StoreCorrupt):
        unpack_seed(save(tensors(), metadata))


def test_a_cut_seed_is_refused():
    content = pack_seed(tensors(), META)
    for length in (0, 7, 8, 200, len(content) - 1):
        with pytest.raises(StoreCorrupt):
            unpack_seed(content[:length])
