"""Parts of a base that cost more in small steps on a CPU than they need to: RMS norms, and attention within short rows.

    norm        y = w x / rms(x)             five passes over x and its gradient, where autograd makes sixteen
    attention   softmax(s Q K^T + mask) V    the score matrix is kept, which is small for short rows; heads that share keys
                                             share one batched product (grouped queries, arXiv 2305.13245)

Both are drop-in: the same formula in the same precision, tested against the module or function that they stand for, and what
does not agree is left as it is. They are for frozen norms, fp32 and a whole base on a CPU; a GPU has kernels for both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from chrysalis_ray.training.blocks import BlockAttention

LEARNING_ASIDE = 16  # tokens from which torch's own attention is faster where nothing is learned: it keeps no scores
SHORT_ROW = 256  # tokens; beyond it scores are better not kept
AT_ONCE = 64  # tokens of a row whose scores are computed whole; longer ones block by block (`blocks.py`)
SHORT = "chrysalis_short_rows"  # the name of this attention in the config of a base
AGREE = 1e-5  # how far a norm may be from the one it replaces, relative to the largest value


def inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    """1 / rms(x) over the last dimension, kept."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(epsilon))


class RmsNorm(torch.autograd.Function):
    """Root mean square norm with a frozen weight (arXiv 1910.07467); x [..., D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_d: Tensor, epsilon: float) -> Tensor:
        inverse = inverse_rms(x, epsilon)
        ctx.save_for_backward(x, weight_d, inverse)
        return (x * inverse).mul_(weight_d)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_d, inverse = ctx.saved_tensors
        grad_x = grad_outputs[0] * weight_d
        along = (grad_x * x).sum(-1, keepdim=True).mul_(inverse.pow(3)).div_(-x.shape[-1])
        return grad_x.mul_(inverse).addcmul_(x, along), None, None


class QuickNorm(nn.Module):
    """An RMS norm of a base, computed by `RmsNorm`."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return RmsNorm.apply(x, self.weight, self.epsilon)
        return (x * inverse_rms(x, self.epsilon)).mul_(self.weight)


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


class ShortAttention(torch.autograd.Function):
    """Attention of queries [N, H, T, D] to keys and values [N, G, T, D], H a multiple of G; `mask` [N, 1, T, T], bool or to be
    added.

    Returns [N, T, H, D]. Every token must be allowed to look at one at least.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        rows, heads, length, size = query.shape
        groups = key.shape[1]
        q_btd = (query * scale).reshape(rows * groups, -1, size)
        k_btd, v_btd = key.reshape(-1, length, size), value.reshape(-1, length, value.shape[-1])
        seen_btd, shares = attend(q_btd, k_btd, v_btd, additive(mask, query.dtype))
        ctx.save_for_backward(q_btd, k_btd, v_btd, shares)
        ctx.shape, ctx.scale = (rows, heads, groups, length), scale
        return seen_btd.view(rows, heads, length, -1).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, heads, groups, length = ctx.shape
        grad_btd = grad_outputs[0].transpose(1, 2).reshape(rows * groups, heads // groups * length, -1)
        grad_q, grad_k, grad_v = attend_back(grad_btd, *ctx.saved_tensors)
        return (
            grad_q.mul_(ctx.scale).view(rows, heads, length, -1),
            grad_k.view(rows, groups, length, -1),
            grad_v.view(rows, groups, length, -1),
            None,
            None,
        )


def short_rows(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for attention; what `ShortAttention` is not made for goes the usual way."""
    odd = settings.keys() - {"scaling", "dropout", "sliding_window", "position_ids", "is_causal", "use_cache"}
    given = {name for name in odd if settings[name] is not None}
    square = query.shape[2] == key.shape[2] <= SHORT_ROW
    if attention_mask is None or not square or given or settings.get("dropout") or query.dtype != torch.float32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    scale = settings.get("scaling") or query.shape[-1] ** -0.5
    if not torch.is_grad_enabled() and query.shape[2] >= LEARNING_ASIDE:
        shared = query.shape[1] // key.shape[1]  # spelt out: torch's fast kernel for a CPU knows no grouped queries
        keys, values = (side.repeat_interleave(shared, 1) for side in (key, value))
        seen = nn.functional.scaled_dot_product_attention(query, keys, values, attention_mask, scale=scale)
        return seen.transpose(1, 2).contiguous(), None
    if query.shape[2] > AT_ONCE:
        return BlockAttention.apply(query, key, value, additive(attention_mask, query.dtype), scale), None
    return ShortAttention.apply(query, key, value, attention_mask, scale), None


def quicken(model: PreTrainedModel) -> None:
    """Replace what can be replaced in a base of fp32 on a CPU."""
    if model.dtype != torch.float32:
        return
    for parent in list(model.modules()):
        for leaf, module in parent.named_children():
            if (norm := _quick_norm(module)) is not None:
                setattr(parent, leaf, norm)
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(SHORT, short_rows)
        AttentionMaskInterface.register(SHORT, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.config._attn_implementation = SHORT


@torch.no_grad()
def _quick_norm(module: nn.Module) -> QuickNorm | None:
    """The quick form of an RMS norm, or None for a module that is something else."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    named_so = type(module).__name__.endswith("RMSNorm")
    if not named_so or not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(epsilon, float):
        return None
    norm = QuickNorm(weight, epsilon)
    x = torch.randn(3, 5, len(weight), generator=torch.Generator().manual_seed(0))
    usual = module(x)
    return norm if (norm(x) - usual).abs().max() <= AGREE * usual.abs().max() else None
