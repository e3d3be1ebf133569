"""Frozen linear modules that read the same x, with the low-rank paths of all variants, as one operation.

    y_k = W_k x + B_k h_k         h = s [A_1; A_2; ...] x      k: q, k, v of an attention, or gate and up of a network

    x_SKI   variants x tokens x in      h_SKC   variants x tokens x (members x rank)      y_SKO   variants x tokens x out

The A of neighbours stand side by side in a row of the bank, so that one batched product projects x down for all of them. What
is saved for the backward pass is x and h alone. Gradients of A and B are added to the bank where they lie; that of x is
summed in place instead of by autograd, node by node. The base serves all rows at once, the low-rank paths bucket by bucket.

It needs the frozen weights themselves. A base that is sharded or quantised is called as a module instead (`packed.LowRank`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chrysalis_ray.training.bank import Stacked, Window
from chrysalis_ray.training.dropout import Passage, product, project_back, project_down, take_out
from chrysalis_ray.training.folded import fold_into, folds

# Attributes of one parent module that are called with the same input. Any other target is a group of its own.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Group:
    """The frozen modules `bases` that read the same x. `names` are theirs in the bank, neighbours in its order."""

    def __init__(self, names: Sequence[str], bases: Sequence[nn.Linear], window: Window) -> None:
        self.names = tuple(names)
        self.bases = tuple(bases)
        self.window = window
        self._x: Tensor | None = None
        self._outputs: dict[str, Tensor] = {}

    def output(self, name: str, x: Tensor) -> Tensor:
        """The output of one member. The first that is called computes all; the others, called with the same x, take theirs."""
        if folds(self.bases[0].weight, x, x.numel() // x.shape[-1] // self.window.variants):
            return self._folded(name, x)
        if self._x is not x or name not in self._outputs:
            bank_A = self.window.factors(self.names[0])[0][0]
            self._x, self._outputs = x, dict(zip(self.names, FusedLowRank.apply(x, bank_A, self), strict=True))
        output = self._outputs.pop(name)
        if not self._outputs:
            self._x = None
        return output

    def _folded(self, name: str, x: Tensor) -> Tensor:
        """The output of one member, each variant's change added to the frozen weights."""
        base, window = self.bases[self.names.index(name)], self.window
        scale_s, x_ski = window.scale_S(name), x.reshape(window.variants, -1, x.shape[-1])
        y_sko = x.new_empty(*x_ski.shape[:2], base.out_features)
        for bucket, (a_sri, b_sor) in zip(window.buckets, window.factors(name), strict=True):
            for place, row in enumerate(range(bucket.rows.start, bucket.rows.stop)):
                fold_into(y_sko[row], base, x_ski[row], a_sri[place], b_sor[place], scale_s[row])
        return y_sko.view(*x.shape[:-1], -1)


class FusedLowRank(torch.autograd.Function):
    """All outputs of a group. `bank_A` is one of its leaves, there to tell autograd that the outputs can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bank_A: Tensor, group: Group) -> tuple[Tensor, ...]:
        window = group.window
        scale_s, buckets = window.scale_S(group.names[0]), window.stacked(group.names)
        x_ski = x.reshape(len(scale_s), -1, x.shape[-1])
        passages = [window.passage.part(weights.rows) if window.passage else None for weights in buckets]
        hidden = []
        for weights, passage in zip(buckets, passages, strict=True):
            own_x_ski = x_ski[weights.rows]
            h_skc = torch.bmm(own_x_ski, weights.a_sci(x.dtype).mT)
            if passage is not None:
                project_down(passage, group.names, own_x_ski, weights.a_smri, h_skc)
            hidden.append((h_skc * scale_s[weights.rows, None, None]).to(x.dtype))  # the scale itself is never rounded first
        outputs = []
        for index, base in enumerate(group.bases):
            y = nn.functional.linear(x, base.weight, base.bias)
            y_sko = y.view(len(scale_s), -1, y.shape[-1])
            for weights, h_skc in zip(buckets, hidden, strict=True):
                h_skr = h_skc[..., index * weights.rank : (index + 1) * weights.rank]
                y_sko[weights.rows].baddbmm_(h_skr, weights.b_sor[index].to(x.dtype).mT)
            outputs.append(y)
        ctx.save_for_backward(x, *hidden)  # and not the factors: see packed.LowRank
        ctx.group, ctx.buckets, ctx.passages, ctx.scale_s = group, buckets, passages, scale_s
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *hidden = ctx.saved_tensors
        variants, width = len(ctx.scale_s), x.shape[-1]
        empty = torch.zeros_like if None in grad_outputs else torch.empty_like
        grad_hidden = [empty(h_skc) for h_skc in hidden]
        grad_x: Tensor | None = None
        for index, grad_y in enumerate(grad_outputs):
            if grad_y is None:
                continue
            grad_y_ko = grad_y.reshape(-1, grad_y.shape[-1])
            grad_y_sko = grad_y_ko.view(variants, -1, grad_y.shape[-1])
            for weights, h_skc, grad_h_skc in zip(ctx.buckets, hidden, grad_hidden, strict=True):
                _up_back(weights, index, h_skc, grad_y_sko[weights.rows], grad_h_skc)
            if ctx.needs_input_grad[0]:
                weight_oi = ctx.group.bases[index].weight
                grad_x = grad_y_ko @ weight_oi if grad_x is None else grad_x.addmm_(grad_y_ko, weight_oi)
        x_ski = x.reshape(variants, -1, width)
        grad_x_ski = grad_x.view(variants, -1, width) if grad_x is not None else None
        for weights, grad_h_skc, passage in zip(ctx.buckets, grad_hidden, ctx.passages, strict=True):
            grad_h_skc = (grad_h_skc * ctx.scale_s[weights.rows, None, None]).to(x.dtype)
            own_grad_x_ski = grad_x_ski[weights.rows] if grad_x_ski is not None else None
            _down_back(weights, ctx.group.names, passage, x_ski[weights.rows], grad_h_skc, own_grad_x_ski)
        return (grad_x.view(x.shape) if grad_x is not None else None), None, None


def _up_back(weights: Stacked, index: int, h_skc: Tensor, grad_y_sko: Tensor, grad_h_skc: Tensor) -> None:
    """Back through one member's B: its gradient is added to the bank, that of h written to its place."""
    part = slice(index * weights.rank, (index + 1) * weights.rank)
    b_sro = weights.b_sor[index].to(h_skc.dtype).mT.contiguous()  # small, and twice as fast to multiply with
    grad_h_skc[..., part] = torch.bmm(grad_y_sko, b_sro.mT)
    # h^T g and not g^T h: a product with few rows is several times faster than one with few columns
    weights.grad_b_sor[index].add_(product(h_skc[..., part].mT, grad_y_sko, weights.grad_a_smri.dtype).mT)


def _down_back(
    weights: Stacked,
    names: Sequence[str],
    passage: Passage | None,
    x_ski: Tensor,
    grad_h_skc: Tensor,
    grad_x_ski: Tensor | None,
) -> None:
    """Back through the A of all members: their gradients are added to the bank, and that of x, if it is wanted, to it."""
    taken = take_out(passage, grad_h_skc) if passage is not None else {}
    grad_a_sci = product(grad_h_skc.mT, x_ski, weights.grad_a_smri.dtype)
    weights.grad_a_smri.add_(grad_a_sci.view(weights.a_smri.shape))
    if grad_x_ski is not None:
        grad_x_ski.baddbmm_(grad_h_skc, weights.a_sci(x_ski.dtype))
    if passage is not None:
        project_back(passage, names, taken, x_ski, weights.a_smri, weights.grad_a_smri, grad_x_ski)
