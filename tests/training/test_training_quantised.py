"""A base of 4 or 8 bits: every variant trains as it would alone on a base with the same rounded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_family
from test_training_against_peft import VARIANTS, largest_difference, train_alone
from torch import nn
from training_texts import PROJECTIONS, STEPS, TextTokens, new_pack, place_fresh, same, variant, weights
from transformers import Qwen3Config

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.seed.linear import linear_shape
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.packed import find_targets
from chrysalis_ray.training.planning import hardware
from chrysalis_ray.training.quantised import Int8Linear, QuantisedLinear, quantise
from chrysalis_ray.training.step import train_chunk

needs_bitsandbytes = pytest.mark.skipif(hardware.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
KINDS = ["int8", pytest.param("nf4", marks=needs_bitsandbytes)]


def whole_again(model: Any, kind: str) -> Any:
    """An ordinary model whose weights are those that a quantised one computes with."""
    quantise(model, kind)
    for parent in list(model.modules()):
        for leaf, part in list(parent.named_children()):
            if isinstance(part, QuantisedLinear):
                linear = nn.Linear(part.in_features, part.out_features, bias=False, dtype=model.dtype)
                linear.weight.data = part.weight_as(model.dtype)
                setattr(parent, leaf, linear.requires_grad_(False))
    return model


def filled(base: Path, kind: str, **options: object) -> Pack:
    pack = new_pack(base, len(VARIANTS), quantization=kind, **options)  # type: ignore[arg-type]
    for slot, member in enumerate(VARIANTS):
        place_fresh(pack, slot, member)
    return pack


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_packed_on_a_quantised_base_equals_separate_peft_on_its_weights(
    threads: int, kind: str, tiny_base: Path, tokens: TextTokens
) -> None:
    pack = filled(tiny_base, kind, dtype=torch.float64, threads=threads)
    train_chunk(pack, range(len(VARIANTS)), tokens, STEPS)  # type: ignore[arg-type]
    for slot in (1, 3):
        rounded = train_alone(tiny_base, pack, VARIANTS[slot], tokens, torch.float64, lambda model: whole_again(model, kind))
        assert largest_difference(weights(pack, slot), rounded) <= 1e-12
    exact = train_alone(tiny_base, pack, VARIANTS[1], tokens, torch.float64)
    assert largest_difference(weights(pack, 1), exact) > 1e-4


@needs_bitsandbytes
def test_packed_on_nf4_equals_peft_on_the_modules_of_bitsandbytes(tiny_base: Path, tokens: TextTokens, tmp_path: Path) -> None:
    """As a user would write QLoRA by hand: bnb.nn.Linear4bit under peft's own layer for it, on rows of whole blocks."""
    import bitsandbytes as bnb

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    base = write_family(Qwen3Config(**sizes, **heads), tmp_path / "base", tiny_base)

    def with_their_modules(model: Any) -> Any:
        for parent in list(model.modules()):
            for leaf, part in list(parent.named_children()):
                if type(part) is nn.Linear and part is not model.lm_head:
                    theirs = bnb.nn.Linear4bit(
                        part.in_features, part.out_features, bias=False, compress_statistics=False, quant_type="nf4"
                    )
                    theirs.weight = bnb.nn.Params4bit(
                        part.weight.data, requires_grad=False, compress_statistics=False, quant_type="nf4", module=theirs
                    )
                    theirs.support_avx512bf16_for_cpu = False  # packs weights for inference, without a gradient
                    setattr(parent, leaf, theirs.to("cpu"))
        return model

    pack = filled(base, "nf4")
    train_chunk(pack, range(len(VARIANTS)), tokens, STEPS)  # type: ignore[arg-type]
    for slot in (0, 1):
        theirs = train_alone(base, pack, VARIANTS[slot], tokens, torch.float32, with_their_modules)
        exact = train_alone(base, pack, VARIANTS[slot], tokens, torch.float64, lambda model: whole_again(model, "nf4"))
        # as on a base that is not quantised: peft in fp32 may itself be further from fp64 than 1e-5
        assert largest_difference(weights(pack, slot), theirs) <= max(1e-5, 2 * largest_difference(theirs, exact))


@pytest.mark.parametrize("kind", KINDS)
def test_a_neighbour_on_a_quantised_base_changes_no_bit(kind: str, tiny_base: Path, tokens: TextTokens) -> None:
    """NaN and outliers beside it: no scale is looked for in the activations of all."""
    calm, poisoned, wild = (filled(tiny_base, kind, lanes="fixed", threads=2) for _ in range(3))
    poisoned.bank.flat_SP[1].fill_(float("nan"))
    place_fresh(wild, 1, variant(9, rank=8, learning_rate=0.5, clip=0.0, alpha=256.0))
    for pack in (calm, poisoned, wild):
        train_chunk(pack, range(4), tokens, 4)  # type: ignore[arg-type]
    for slot in (0, 2, 3):
        assert same(calm.harvest(slot)[0], poisoned.harvest(slot)[0])
        assert same(calm.harvest(slot)[0], wild.harvest(slot)[0])


@pytest.mark.parametrize(("kind", "bits", "error"), [("int8", 8, 0.01), pytest.param("nf4", 4, 0.12, marks=needs_bitsandbytes)])
def test_what_is_kept_and_how_far_it_is_rounded(kind: str, bits: int, error: float, tiny_base: Path) -> None:
    exact, rounded = load_base(tiny_base, "fp32"), load_base(tiny_base, "fp32", kind)
    assert type(rounded.lm_head) is nn.Linear
    assert torch.equal(rounded.model.embed_tokens.weight, exact.model.embed_tokens.weight)
    assert find_targets(rounded, PROJECTIONS) == find_targets(exact, PROJECTIONS)
    for name, module in exact.named_modules():
        if type(module) is nn.Linear and module is not exact.lm_head:
            small = rounded.get_submodule(name)
            assert isinstance(small, QuantisedLinear)
            assert linear_shape(small) == linear_shape(module)
            assert small.stored.nbytes * 8 == bits * module.weight.numel()
            distance = (small.weight_as(torch.float32) - module.weight).norm() / module.weight.norm()
            assert 0 < distance < error
    assert not any(parameter.requires_grad for parameter in rounded.parameters())


def test_the_gradient_of_a_quantised_module_is_that_of_its_weight() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 10, dtype=torch.float64)
    linear.weight.data[3] = 0.0
    small = Int8Linear(linear.requires_grad_(False))
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(small, (x,))
    plain = nn.functional.linear(x, small.weight_as(torch.float64), linear.bias)
    assert (small(x) - plain).abs().max() <= 1e-14
    assert not small.weight_as(torch.float64)[3].any()


def test_recomputed_layers_of_a_quantised_base_change_no_bit(tiny_base: Path, tokens: TextTokens) -> None:
    kept, recomputed = (filled(tiny_base, "int8", recompute=again) for again in (False, True))
    for pack in (kept, recomputed):
        train_chunk(pack, range(4), tokens, 2)  # type: ignore[arg-type]
    assert all(same(kept.harvest(slot)[0], recomputed.harvest(slot)[0]) for slot in range(4))


def test_without_bitsandbytes_nf4_is_refused_with_the_remedy(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "find_spec", lambda name: None)
    hardware.check_quantisation("int8")
    with pytest.raises(ModelError, match=r"bitsandbytes, and it is not installed\n.*pip install"):
        load_base(tiny_base, "fp32", "nf4")
