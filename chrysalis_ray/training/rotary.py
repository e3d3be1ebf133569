"""Attention within short rows whose heads are turned by their positions (rotary embedding, arXiv 2104.09864), as one function.

    q = turn(norm(x_q)) s      k = turn(norm(x_k))      softmax(q k^T + mask) v

    x_NTHD    what the projections give      q_NHTD    normed (or not), turned, and scaled      D    of one head, in two halves

Norm, turn and scale of a head are one linear map and one number: the weight of the norm goes into cosines and sines, and what
a row of x is divided by comes last. Saved are x, that number, and what the products need.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SHORT_ROW = 256  # tokens; beyond it scores are better not kept
LEARNING_ASIDE = 16  # tokens from which torch's own attention is faster where nothing is learned: it keeps no scores
ROTARY = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")  # classes of transformers that are this


class Turn(NamedTuple):
    """What turns the heads [N, 1, T, D]: a head's halves (a, b) become cosines (a, b) + sines (b, a). `epsilon` is the norm's,
    None where heads are not normed."""

    cosines: Tensor
    sines: Tensor
    epsilon: float | None

    def forward(self, x_NTHD: Tensor) -> tuple[Tensor, Tensor | None]:
        """The turned heads [N, H, T, D], contiguous, and what they were multiplied by in the end [N, H, T, 1]."""
        x_NHTD, half = x_NTHD.transpose(1, 2), x_NTHD.shape[-1] // 2
        turned = x_NHTD.clone(memory_format=torch.contiguous_format).mul_(self.cosines)
        turned[..., :half].addcmul_(x_NHTD[..., half:], self.sines[..., :half])
        turned[..., half:].addcmul_(x_NHTD[..., :half], self.sines[..., half:])
        if self.epsilon is None:
            return turned, None
        norm = torch.linalg.vector_norm(x_NHTD, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x_NTHD.shape[-1]).add_(self.epsilon).rsqrt_()
        return turned.mul_(inverse), inverse

    def backward(self, grad_NHTD: Tensor, x_NTHD: Tensor, turned: Tensor, inverse: Tensor | None) -> Tensor:
        """The gradient of x [N, T, H, D], contiguous."""
        grad_NTHD, half = grad_NHTD.transpose(1, 2), x_NTHD.shape[-1] // 2
        cosines, sines = self.cosines.transpose(1, 2), self.sines.transpose(1, 2)
        grad_x = grad_NTHD.clone(memory_format=torch.contiguous_format).mul_(cosines)
        grad_x[..., :half].addcmul_(grad_NTHD[..., half:], sines[..., half:])
        grad_x[..., half:].addcmul_(grad_NTHD[..., :half], sines[..., :half])
        if inverse is not None:
            along = (grad_NHTD * turned).sum(-1, keepdim=True).mul_(inverse.square()).div_(-x_NTHD.shape[-1])
            grad_x.mul_(inverse.transpose(1, 2)).addcmul_(x_NTHD, along.transpose(1, 2))
        return grad_x


def turn_of(cosines_NTD: Tensor, sines_NTD: Tensor, weight_D: Tensor | None, epsilon: float | None, scale: float = 1.0) -> Turn:
    """The turn by these angles, after a norm with this weight, times `scale`."""
    half = cosines_NTD.shape[-1] // 2
    own = cosines_NTD.new_ones(2 * half) if weight_D is None else weight_D
    signed = torch.cat([own[half:].neg(), own[:half]]) * scale  # the weight belongs to the half that a sine multiplies
    return Turn((cosines_NTD * (own * scale))[:, None], (sines_NTD * signed)[:, None], None if weight_D is None else epsilon)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to scores: where a bool mask says no, minus infinity."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else mask


def attend(q_btd: Tensor, k_btd: Tensor, v_btd: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What every query sees, and the shares of all it looks at. Heads that share keys are one batch of b, one below the other;
    `mask` [N, 1, T, T] is added. Every token must be allowed to look at one at least."""
    length = k_btd.shape[1]
    scores = torch.bmm(q_btd, k_btd.mT)
    scores.view(len(mask), -1, length, length).add_(mask)
    shares = torch.softmax(scores, -1)
    return torch.bmm(shares, v_btd), shares


def attend_back(grad_btd: Tensor, q_btd: Tensor, k_btd: Tensor, v_btd: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    grad_v = torch.bmm(shares.mT, grad_btd)
    grad_scores = torch.ops.aten._softmax_backward_data(torch.bmm(grad_btd, v_btd.mT), shares, -1, shares.dtype)
    return torch.bmm(grad_scores, k_btd), torch.bmm(grad_scores.mT, q_btd), grad_v


class RotaryAttention(torch.autograd.Function):
    """Projections [N, T, H x D], [N, T, G x D] twice, to what the heads see [N, T, H x D]; H is a multiple of G."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, query_turn: Turn, key_turn: Turn, mask: Tensor) -> Tensor:
        size = query_turn.cosines.shape[-1]
        x_q, x_k, x_v = (projected.unflatten(-1, (-1, size)) for projected in (query, key, value))
        rows, length, groups = x_k.shape[:3]
        (turned_q, inverse_q), (turned_k, inverse_k) = query_turn.forward(x_q), key_turn.forward(x_k)
        q_btd, k_btd = turned_q.view(rows * groups, -1, size), turned_k.view(rows * groups, length, size)
        v_btd = x_v.transpose(1, 2).reshape(rows * groups, length, size)
        seen_btd, shares = attend(q_btd, k_btd, v_btd, mask)
        ctx.save_for_backward(x_q, x_k, q_btd, k_btd, v_btd, shares, inverse_q, inverse_k)
        ctx.turns = query_turn, key_turn
        return seen_btd.view(rows, -1, length, size).transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_q, x_k, q_btd, k_btd, v_btd, shares, inverse_q, inverse_k = ctx.saved_tensors
        query_turn, key_turn = ctx.turns
        rows, length, groups, size = x_k.shape
        grad_btd = grad_outputs[0].unflatten(-1, (-1, size)).transpose(1, 2).reshape(rows * groups, -1, size)
        grad_q, grad_k, grad_v = attend_back(grad_btd, q_btd, k_btd, v_btd, shares)
        heads = (rows, -1, length, size)
        grad_query = query_turn.backward(grad_q.view(heads), x_q, q_btd.view(heads), inverse_q)
        grad_key = key_turn.backward(grad_k.view(heads), x_k, k_btd.view(heads), inverse_k)
        grad_value = grad_v.view(heads).transpose(1, 2)
        return grad_query.flatten(2), grad_key.flatten(2), grad_value.flatten(2), None, None, None


class QuickAttention(nn.Module):
    """Put before a class of `ROTARY`: its forward pass for short rows with a mask; others go the usual way."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        own: Any = self
        odd = past_key_values is not None or own.training
        longest = SHORT_ROW if torch.is_grad_enabled() else LEARNING_ASIDE - 1
        if attention_mask is None or odd or hidden_states.shape[1] > longest or hidden_states.dtype != torch.float32:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **settings)
        query, key, value = own.q_proj(hidden_states), own.k_proj(hidden_states), own.v_proj(hidden_states)
        query_norm, key_norm = getattr(own, "q_norm", None), getattr(own, "k_norm", None)
        turns = (
            turn_of(*position_embeddings, getattr(norm, "weight", None), getattr(norm, "epsilon", None), scale)
            for norm, scale in ((query_norm, own.scaling), (key_norm, 1.0))
        )
        mask = additive(attention_mask, hidden_states.dtype)
        return own.o_proj(RotaryAttention.apply(query, key, value, *turns, mask)), None


@torch.no_grad()
def quicken_attention(module: nn.Module, agree: float) -> None:
    """Give an attention of `ROTARY` the quick forward pass, if the two agree to this share of the largest value.

    Its norms must be quick ones already (`quick.QuickNorm`), if it has any.
    """
    usual = type(module)
    norms = [norm for name in ("q_norm", "k_norm") if (norm := getattr(module, name, None)) is not None]
    if usual.__name__ not in ROTARY or not all(hasattr(norm, "epsilon") for norm in norms):
        return
    own: Any = module
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, own.q_proj.in_features, generator=generator)
    angles = torch.rand(2, 5, own.head_dim // 2, generator=generator).repeat(1, 1, 2)
    mask = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    given = (x, (angles.cos(), angles.sin()), mask)
    expected = own(*given)[0]
    module.__class__ = type(f"Quick{usual.__name__}", (QuickAttention, usual), {})
    if not (own(*given)[0] - expected).abs().max() <= agree * expected.abs().max():
        module.__class__ = usual
