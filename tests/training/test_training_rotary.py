"""Attention with turned heads as one function: its gradient, and the attentions of transformers that it stands for."""

from __future__ import annotations

import pytest
import torch
from families import SUPPORTED
from torch import nn
from transformers import AutoModelForCausalLM

from chrysalis_ray.training import rotary
from chrysalis_ray.training.quick import AGREE, QuickNorm, quicken
from chrysalis_ray.training.rotary import QuickAttention, RotaryAttention, additive, quicken_attention, turn_of
from chrysalis_ray.training.trunk import document_mask

ROWS, LENGTH, SIZE = 2, 6, 4
QUICK = {"qwen3", "qwen2", "llama", "mistral"}


def drawn(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def angles() -> tuple[torch.Tensor, torch.Tensor]:
    half = drawn(ROWS, LENGTH, SIZE // 2).repeat(1, 1, 2)
    return half.cos(), half.sin()


def mask() -> torch.Tensor:
    return document_mask((torch.arange(LENGTH) % 4).expand(ROWS, LENGTH))


def plainly(x: torch.Tensor, weight: torch.Tensor | None, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Heads [N, H, T, D] as transformers computes them."""
    heads = x.unflatten(-1, (-1, SIZE)).transpose(1, 2)
    if weight is not None:
        heads = weight * heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + 1e-5)
    first, second = heads.chunk(2, -1)
    return heads * cosines[:, None] + torch.cat([-second, first], -1) * sines[:, None]


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 1), (1, 1)])
def test_it_and_its_gradient_are_those_of_the_formula(heads: int, groups: int, normed: bool) -> None:
    cosines, sines = angles()
    weights = (drawn(SIZE), drawn(SIZE) + 1.0) if normed else (None, None)
    turns = [turn_of(cosines, sines, weight, 1e-5, scale) for weight, scale in zip(weights, (0.3, 1.0), strict=True)]
    given = [drawn(ROWS, LENGTH, count * SIZE).requires_grad_() for count in (heads, groups, groups)]

    def usual(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k = plainly(query, weights[0], cosines, sines), plainly(key, weights[1], cosines, sines)
        v = value.unflatten(-1, (-1, SIZE)).transpose(1, 2)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, mask(), scale=0.3, enable_gqa=True)
        return seen.transpose(1, 2).flatten(2)

    def quick(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return RotaryAttention.apply(query, key, value, *turns, additive(mask(), torch.float64))

    direction = drawn(ROWS, LENGTH, heads * SIZE)
    expected, found = usual(*given), quick(*given)
    assert (found - expected).abs().max() <= 1e-12
    gradients = [torch.autograd.grad((told * direction).sum(), given) for told in (expected, found)]
    assert max((left - right).abs().max() for left, right in zip(*gradients, strict=True)) <= 1e-12
    assert torch.autograd.gradcheck(quick, given)


@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_only_what_it_is_made_for_becomes_quick_and_hidden_states_stay(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SUPPORTED[family].config()).eval().requires_grad_(False)
    ids, positions = torch.arange(24).reshape(2, 12) % 50, torch.arange(12).expand(2, 12)
    allowed = document_mask(positions)
    if model.config._attn_implementation == "eager":
        allowed = additive(allowed, torch.float32)
    given = {"input_ids": ids, "position_ids": positions, "attention_mask": allowed, "use_cache": False}
    usual = model.base_model(**given).last_hidden_state
    quicken(model)
    assert any(isinstance(module, QuickAttention) for module in model.modules()) == (family in QUICK)
    assert (model.base_model(**given).last_hidden_state - usual).abs().max() <= 1e-5 * usual.abs().max()


def tiny_attention() -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SUPPORTED["qwen3"].config()).eval().requires_grad_(False)
    attention = model.model.layers[0].self_attn
    for name in ("q_norm", "k_norm"):
        setattr(attention, name, QuickNorm(getattr(attention, name).weight, 1e-6))
    return attention


def test_an_attention_that_computes_something_else_stays_as_it_is() -> None:
    """Under a known name, but with queries of its own making."""

    class Qwen3Attention(type(tiny_attention())):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, *given: object, **settings: object) -> tuple[torch.Tensor, None]:
            out, _ = super().forward(hidden_states, *given, **settings)
            return out + 0.01 * hidden_states, None

    known, odd = tiny_attention(), tiny_attention()
    odd.__class__ = Qwen3Attention
    for attention in (known, odd):
        quicken_attention(attention, AGREE)
    assert isinstance(known, QuickAttention)
    assert type(odd) is Qwen3Attention


def test_long_rows_and_other_precisions_go_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = tiny_attention()
    usual = type(attention)
    quicken_attention(attention, AGREE)
    called = []
    monkeypatch.setattr(rotary.RotaryAttention, "apply", lambda *given: called.append(given) or given[0])
    for length, dtype, quick in ((6, torch.float32, True), (300, torch.float32, False), (6, torch.float64, False)):
        called.clear()
        own = attention.to(dtype)
        x, positions = (
            torch.randn(1, length, 48, dtype=dtype),
            torch.arange(length, dtype=dtype)[None, :, None].repeat(1, 1, 16),
        )
        out, _ = own(x, (positions.cos(), positions.sin()), document_mask(torch.arange(length)[None]))
        assert (out.shape, bool(called)) == (x.shape, quick)
    assert isinstance(attention, usual)
