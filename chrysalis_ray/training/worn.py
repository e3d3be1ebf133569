"""A decoder layer where nothing is learned: it wears one candidate after the other, and computes few tokens at a time.

    W_c = W + B_c A_c                              the seven matrices of a layer, made for one candidate and thrown away
    x   = x + W_o attend(turn(q), turn(k), v)      q, k, v of norm(x); q and k normed by head where the family does so
    x   = x + W_down (silu(gate) * up)             gate and up of norm(x)

What a candidate makes of few tokens stays in the cache of a core from the first norm to the last sum, and its matrices are made
once, however many passes they serve. As they are made anew anyhow, those of q, k and v are one, and rows of q and k come in an
order that spares copies: the halves of a head that turn together (rotary embedding, arXiv 2104.09864) stand side by side and
are complex numbers. Turning writes them where attention reads them: S heads that share keys (arXiv 2305.13245) and T tokens are
S x T queries of one head.

    x_KD   tokens x width      q_NGTSD   rows x keys x tokens x heads that share keys x size of a head      N x T = K
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chrysalis_ray.training.blocks import see_by_blocks
from chrysalis_ray.training.folded import folds
from chrysalis_ray.training.packed import PackedLinear
from chrysalis_ray.training.quick import AGREE, QuickNorm, additive, inverse_rms

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")  # of transformers
MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip
AT_ONCE = 1024  # tokens: what comes of them between two norms stays near the core that reads it again


class Matrix(NamedTuple):
    """A matrix that a candidate wears, and the bias of the frozen module."""

    weight_OI: Tensor
    bias_O: Tensor | None

    def of(self, x_KI: Tensor) -> Tensor:
        return nn.functional.linear(x_KI, self.weight_OI, self.bias_O)

    def add_to(self, y_KO: Tensor, x_KI: Tensor) -> None:
        """Add what it makes of x to y."""
        y_KO.addmm_(x_KI, self.weight_OI.mT)
        if self.bias_O is not None:
            y_KO.add_(self.bias_O)


class WornLayer(nn.Module):
    """Put before a class of `LAYERS`: its forward pass where nothing is learned; any other pass goes the usual way."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **settings: Any,
    ) -> Tensor:
        lanes = lanes_of(self)
        worn = past_key_values is None and is_worn(self, hidden_states, lanes)
        if worn and attention_mask is not None and position_embeddings is not None:
            return worn_pass(self, hidden_states, attention_mask, position_embeddings, lanes)
        settings |= {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        settings |= {"use_cache": use_cache, "position_embeddings": position_embeddings}
        usual: Any = super().forward
        return usual(hidden_states, **settings)  # by name: their order is each version's own


def worn_pass(layer: Any, x_NTD: Tensor, mask: Tensor, angles: tuple[Tensor, Tensor], lanes: int) -> Tensor:
    """What the layer makes of x, whose rows arrive lane by lane. `mask` [N, 1, T, T] is added to the scores, or says who may
    look at whom; `angles` are cosines and sines [N, T, D]."""
    y_NTD = x_NTD.clone()
    rows, at_once = len(x_NTD) // lanes, max(1, AT_ONCE // x_NTD.shape[1])
    cosines, sines = angles
    half = cosines.shape[-1] // 2
    turn_NTZ = torch.complex(cosines[..., :half], sines[..., :half])
    for lane in range(lanes):
        clothes = Clothes(layer, lane)
        for start in range(lane * rows, (lane + 1) * rows, at_once):
            part = slice(start, min(start + at_once, (lane + 1) * rows))
            clothes.attend(y_NTD[part], mask[part], turn_NTZ[part])
            clothes.think(y_NTD[part].flatten(0, 1))
    return y_NTD


class Clothes:
    """The matrices of one candidate in one layer, each made when it is first needed: what was just written is still near."""

    def __init__(self, layer: Any, lane: int) -> None:
        attention = layer.self_attn
        self.layer, self.lane = layer, lane
        self.size, self.scale = attention.head_dim, attention.scaling
        self.modules = matrices_of(layer)
        self.heads, self.groups = (base_of(module).out_features // self.size for module in self.modules[:2])
        self.norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]

    @cached_property
    def qkv(self) -> Matrix:
        """The matrices of q, k and v, one below the other."""
        orders = [_paired(heads * self.size, self.size) for heads in (self.heads, self.groups)]
        return stacked(self.modules[:3], [*orders, None], self.lane)

    @cached_property
    def o(self) -> Matrix:
        return matrix_of(self.modules[3], self.lane)

    @cached_property
    def gate(self) -> Matrix:
        return matrix_of(self.modules[4], self.lane)

    @cached_property
    def up(self) -> Matrix:
        return matrix_of(self.modules[5], self.lane)

    @cached_property
    def down(self) -> Matrix:
        return matrix_of(self.modules[6], self.lane)

    def attend(self, y_NTD: Tensor, mask: Tensor, turn_NTZ: Tensor) -> None:
        """Add what attention makes of y to y."""
        rows, length, width = y_NTD.shape
        y_KD = y_NTD.view(-1, width)
        x_NTHD = self.qkv.of(self.layer.input_layernorm(y_KD)).view(rows, length, -1, self.size)
        q_NTHD, k_NTGD, v_NTGD = x_NTHD.split([self.heads, self.groups, self.groups], 2)
        q_NTHD, k_NTGD = (self._normed(x, norm) for x, norm in zip((q_NTHD, k_NTGD), self.norms, strict=True))
        q_NTGSD = q_NTHD.unflatten(2, (self.groups, -1))
        q_NGTSD = y_NTD.new_empty(rows, self.groups, length, *q_NTGSD.shape[3:])
        k_NGTD = y_NTD.new_empty(rows, self.groups, length, self.size)
        turn_into(q_NGTSD.transpose(1, 2), q_NTGSD, (turn_NTZ * self.scale)[:, :, None, None])  # so that scores are scaled
        turn_into(k_NGTD.transpose(1, 2), k_NTGD, turn_NTZ[:, :, None])
        seen_NTGSD = see_by_blocks(q_NGTSD, k_NGTD, v_NTGD.transpose(1, 2), additive(mask, y_NTD.dtype))
        self.o.add_to(y_KD, seen_NTGSD.view(len(y_KD), -1))

    def think(self, y_KD: Tensor) -> None:
        """Add what the network makes of y to y."""
        x_KD = self.layer.post_attention_layernorm(y_KD)
        gate_KI = nn.functional.silu(self.gate.of(x_KD), inplace=True)
        self.down.add_to(y_KD, gate_KI.mul_(self.up.of(x_KD)))

    def _normed(self, x_NTHD: Tensor, norm: QuickNorm | None) -> Tensor:
        """Heads normed, where the family does so."""
        if norm is None:
            return x_NTHD
        return (x_NTHD * inverse_rms(x_NTHD, norm.epsilon)).mul_(norm.weight[_paired(self.size, self.size)])


def _paired(count: int, size: int) -> Tensor:
    """An order of `count` rows that brings together what stands in both halves of a head."""
    return torch.arange(count).view(-1, 2, size // 2).transpose(1, 2).flatten()


def turn_into(turned: Tensor, x: Tensor, turn: Tensor) -> None:
    """Write x, turned by its position, into `turned`, however that lies."""
    there, here = (torch.view_as_complex(each.unflatten(-1, (-1, 2))) for each in (turned, x))
    torch.mul(here, turn, out=there)


def matrices_of(layer: nn.Module) -> list[nn.Module]:
    return [layer.get_submodule(name) for name in MATRICES]


def base_of(module: nn.Module) -> Any:
    """The frozen module itself, where adapters are packed beside it."""
    return module.base if isinstance(module, PackedLinear) else module


def matrix_of(module: nn.Module, lane: int) -> Matrix:
    """The matrix of a linear module, packed or not, as one lane of the pass has it."""
    base = base_of(module)
    return Matrix(module.worn(lane) if isinstance(module, PackedLinear) else base.weight, base.bias)


def stacked(modules: Sequence[nn.Module], orders: Sequence[Tensor | None], lane: int) -> Matrix:
    """The matrices of modules that read the same, one below the other, the rows of each in an order of its own."""
    bases = [base_of(module) for module in modules]
    weight_OI = bases[0].weight.new_empty(sum(base.out_features for base in bases), bases[0].in_features)
    places, biases = weight_OI.split([base.out_features for base in bases]), []
    for module, base, order_O, place_OI in zip(modules, bases, orders, places, strict=True):
        change = module.change(lane) if isinstance(module, PackedLinear) else None
        own_OI, bias_O = base.weight, weight_OI.new_zeros(base.out_features) if base.bias is None else base.bias
        if order_O is not None:
            own_OI, bias_O = own_OI[order_O], bias_O[order_O]
        if change is None:
            place_OI.copy_(own_OI)
        else:
            a_RI, b_OR = change
            torch.addmm(own_OI, b_OR if order_O is None else b_OR[order_O], a_RI, out=place_OI)
        biases.append(bias_O)
    return Matrix(weight_OI, torch.cat(biases) if any(base.bias is not None for base in bases) else None)


def lanes_of(layer: nn.Module) -> int:
    """How many candidates' rows go through the layer, one candidate's after the other's; one where it changes nothing."""
    return next((module.window.lanes for module in matrices_of(layer) if isinstance(module, PackedLinear)), 1)


def is_worn(layer: nn.Module, x_NTD: Tensor, lanes: int) -> bool:
    """Whether matrices made for a candidate are less work than changes carried beside them, and nobody looks at a module."""
    tokens = x_NTD.numel() // x_NTD.shape[-1] // lanes
    for module in matrices_of(layer):
        base = base_of(module)
        if module._forward_pre_hooks or module._forward_hooks or type(base) is not nn.Linear:
            return False
        if isinstance(module, PackedLinear) and module.window.passage is not None:
            return False
        if not folds(base.weight, x_NTD, tokens):
            return False
    return True


def wear(model: PreTrainedModel) -> bool:
    """Give the layers of `LAYERS` their pass for candidates in a base of fp32, where it comes to what the layer itself does.
    Returns whether there are any.

    Norms must be quick ones already (`quick.quicken`). One layer of a class is tried for all of it.
    """
    tried: dict[type[nn.Module], bool] = {}
    if model.dtype != torch.float32:
        return False
    for layer in model.modules():
        usual = type(layer)
        if usual.__name__ not in LAYERS or "forward" in vars(layer):  # one that is recomputed is called by a name of its own
            continue
        if usual not in tried:
            tried[usual] = agrees(layer)
        if tried[usual]:
            layer.__class__ = type(f"Worn{usual.__name__}", (WornLayer, usual), {})
    return any(tried.values())


def undress(layer: nn.Module) -> None:
    """Make a layer what it was before `wear`."""
    if isinstance(layer, WornLayer):
        layer.__class__ = type(layer).__mro__[2]


@torch.no_grad()
def agrees(layer: Any) -> bool:
    """Whether both passes of a layer come to the same, to `AGREE` of the largest value."""
    norms = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
    plain = all(type(module) is nn.Linear for module in matrices_of(layer))
    if not plain or any(norm is not None and not isinstance(norm, QuickNorm) for norm in norms):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, layer.self_attn.q_proj.in_features, generator=generator)
    angles = torch.rand(2, 5, layer.self_attn.head_dim // 2, generator=generator).repeat(1, 1, 2)
    mask = additive(torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5), x.dtype)
    turned = angles.cos(), angles.sin()
    usual = layer(x, attention_mask=mask, position_embeddings=turned)
    return bool((worn_pass(layer, x, mask, turned, 1) - usual).abs().max() <= AGREE * usual.abs().max())
