"""A decoder layer where nothing is learned: it wears one candidate after the other, and computes few tokens at a time.

    W_c = W + B_c A_c                              the seven matrices of a layer, made for one candidate and thrown away
    x   = x + W_o attend(turn(q), turn(k), v)      q, k, v of norm(x); q and k normed by head where the family does so
    x   = x + W_down (silu(gate) * up)             gate and up of norm(x)

What a candidate makes of few tokens stays in the cache of a core from the first norm to the last sum, and its matrices are made
once, however many passes they serve. As they are made anew anyhow, rows of W_q and W_k and columns of W_o come in an order that
spares copies: the halves of a head that turn together (rotary embedding, arXiv 2104.09864) stand side by side and are complex
numbers; heads that share keys (arXiv 2305.13245) stand so that S of them and T tokens are S x T queries of one head.

    x_KD   tokens x width      q_NTSGD   rows x tokens x heads that share keys x keys x size of a head      N x T = K
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chrysalis_ray.training.folded import folds
from chrysalis_ray.training.packed import PackedLinear
from chrysalis_ray.training.quick import AGREE, QuickNorm, RmsNorm, additive

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

    def rows(self, order_O: Tensor) -> Matrix:
        return Matrix(self.weight_OI[order_O], None if self.bias_O is None else self.bias_O[order_O])


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
    """What the layer makes of x, whose rows arrive lane by lane. `mask` [N, 1, T, T] is added to the scores; `angles` are
    cosines and sines [N, T, D]."""
    y_NTD = x_NTD.clone()
    rows, at_once = len(x_NTD) // lanes, max(1, AT_ONCE // x_NTD.shape[1])
    cosines, sines = angles
    half = cosines.shape[-1] // 2
    turn_NT1Z = torch.complex(cosines[..., :half], sines[..., :half])[:, :, None]
    for lane in range(lanes):
        clothes = Clothes(layer, lane)
        for start in range(lane * rows, (lane + 1) * rows, at_once):
            part = slice(start, min(start + at_once, (lane + 1) * rows))
            clothes.attend(y_NTD[part], mask[part], turn_NT1Z[part])
            clothes.think(y_NTD[part].flatten(0, 1))
    return y_NTD


class Clothes:
    """The matrices of one candidate in one layer."""

    def __init__(self, layer: Any, lane: int) -> None:
        attention = layer.self_attn
        self.layer = layer
        self.size, self.scale = attention.head_dim, attention.scaling
        q, k, self.v, o, self.gate, self.up, self.down = (matrix_of(module, lane) for module in matrices_of(layer))
        self.groups = len(k.weight_OI) // self.size
        self.shared = len(q.weight_OI) // len(k.weight_OI)
        # keys, heads that share them, half, half of a head -> heads, keys, half of a head, half
        order = torch.arange(len(q.weight_OI)).view(self.groups, self.shared, 2, -1).permute(1, 0, 3, 2).flatten()
        self.q, self.k = q.rows(order), k.rows(self._paired(len(k.weight_OI)))
        seen_OGSD = o.weight_OI.view(-1, self.groups, self.shared, self.size)
        self.o = Matrix(seen_OGSD.transpose(1, 2).flatten(1), o.bias_O)
        self.norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]

    def attend(self, y_NTD: Tensor, mask: Tensor, turn_NT1Z: Tensor) -> None:
        """Add what attention makes of y to y."""
        rows, length, width = y_NTD.shape
        y_KD = y_NTD.view(-1, width)
        x_KD = self.layer.input_layernorm(y_KD)
        q_NTHD, k_NTGD, v_NTGD = (own.of(x_KD).view(rows, length, -1, self.size) for own in (self.q, self.k, self.v))
        q_NTHD, k_NTGD = (self._turned(x, norm, turn_NT1Z) for x, norm in zip((q_NTHD, k_NTGD), self.norms, strict=True))
        q_NGLD = q_NTHD.view(rows, length * self.shared, self.groups, self.size).transpose(1, 2)
        mask_N1LT = mask if self.shared == 1 else mask.repeat_interleave(self.shared, 2)
        seen_NGLD = nn.functional.scaled_dot_product_attention(
            q_NGLD, k_NTGD.transpose(1, 2), v_NTGD.transpose(1, 2), mask_N1LT, scale=self.scale
        )
        self.o.add_to(y_KD, seen_NGLD.transpose(1, 2).reshape(rows * length, -1))

    def think(self, y_KD: Tensor) -> None:
        """Add what the network makes of y to y."""
        x_KD = self.layer.post_attention_layernorm(y_KD)
        gate_KI = nn.functional.silu(self.gate.of(x_KD), inplace=True)
        self.down.add_to(y_KD, gate_KI.mul_(self.up.of(x_KD)))

    def _turned(self, x_NTHD: Tensor, norm: QuickNorm | None, turn_NT1Z: Tensor) -> Tensor:
        """Heads normed and turned by their position."""
        if norm is not None:
            x_NTHD = RmsNorm.apply(x_NTHD, norm.weight[self._paired(self.size)], norm.epsilon)
        torch.view_as_complex(x_NTHD.unflatten(-1, (-1, 2))).mul_(turn_NT1Z)
        return x_NTHD

    def _paired(self, count: int) -> Tensor:
        """An order that brings together what stands in both halves of a head."""
        return torch.arange(count).view(-1, 2, self.size // 2).transpose(1, 2).flatten()


def matrices_of(layer: nn.Module) -> list[nn.Module]:
    return [layer.get_submodule(name) for name in MATRICES]


def matrix_of(module: nn.Module, lane: int) -> Matrix:
    """The matrix of a linear module, packed or not, as one lane of the pass has it."""
    base: Any = module.base if isinstance(module, PackedLinear) else module
    return Matrix(module.worn(lane) if isinstance(module, PackedLinear) else base.weight, base.bias)


def lanes_of(layer: nn.Module) -> int:
    """How many candidates' rows go through the layer, one candidate's after the other's; one where it changes nothing."""
    return next((module.window.lanes for module in matrices_of(layer) if isinstance(module, PackedLinear)), 1)


def is_worn(layer: nn.Module, x_NTD: Tensor, lanes: int) -> bool:
    """Whether matrices made for a candidate are less work than changes carried beside them, and nobody looks at a module."""
    tokens = x_NTD.numel() // x_NTD.shape[-1] // lanes
    for module in matrices_of(layer):
        base = module.base if isinstance(module, PackedLinear) else module
        if module._forward_pre_hooks or module._forward_hooks or type(base) is not nn.Linear:
            return False
        if isinstance(module, PackedLinear) and module.window.passage is not None:
            return False
        if not folds(base.weight, x_NTD, tokens):
            return False
    return True


def wear(model: PreTrainedModel) -> None:
    """Give the layers of `LAYERS` their pass for candidates in a base of fp32, where it comes to what the layer itself does.

    Norms must be quick ones already (`quick.quicken`). One layer of a class is tried for all of it.
    """
    tried: dict[type[nn.Module], bool] = {}
    if model.dtype != torch.float32:
        return
    for layer in model.modules():
        usual = type(layer)
        if usual.__name__ in LAYERS and usual not in tried:
            tried[usual] = agrees(layer)
        if tried.get(usual):
            layer.__class__ = type(f"Worn{usual.__name__}", (WornLayer, usual), {})


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
