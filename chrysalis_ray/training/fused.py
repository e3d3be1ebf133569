"""Frozen linear modules that read the same x, with the low-rank paths of all variants, as one operation.

    y_k = W_k x + B_k h_k         h = s [A_1; A_2; ...] x      k: q, k, v of an attention, or gate and up of a network

    x_SKI   variants x tokens x in      h_SKC   variants x tokens x (members x rank)      y_SKO   variants x tokens x out

The A of neighbours stand side by side in a row of the bank, so that one batched product projects x down for all of them. What
is saved for the backward pass is x and h alone. Gradients of A and B are added to the bank where they lie; that of x is
summed in place instead of by autograd, node by node.

It needs the frozen weights themselves. A base that is sharded or quantised is called as a module instead (`packed.LowRank`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chrysalis_ray.training.bank import Window
from chrysalis_ray.training.dropout import product, project_back, project_down, take_out

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
        if self._x is not x or name not in self._outputs:
            bank_A = self.window.factors(self.names[0])[0]
            self._x, self._outputs = x, dict(zip(self.names, FusedLowRank.apply(x, bank_A, self), strict=True))
        output = self._outputs.pop(name)
        if not self._outputs:
            self._x = None
        return output


class FusedLowRank(torch.autograd.Function):
    """All outputs of a group. `bank_A` is one of its leaves, there to tell autograd that the outputs can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bank_A: Tensor, group: Group) -> tuple[Tensor, ...]:
        weights = group.window.stacked(group.names)
        variants, rank = weights.a_sci.shape[0], weights.rank
        x_ski = x.reshape(variants, -1, x.shape[-1])
        h_skc = torch.bmm(x_ski, weights.a_sci.to(x.dtype).mT)
        passage = group.window.passage
        if passage is not None:
            project_down(passage, group.names, x_ski, weights.a_sci, h_skc)
        h_skc = (h_skc * group.window.scale_S[:, None, None]).to(x.dtype)  # the scale itself is never rounded first
        outputs = []
        for index, (base, b_sor) in enumerate(zip(group.bases, weights.b_sor, strict=True)):
            y = nn.functional.linear(x, base.weight, base.bias)
            h_skr = h_skc[..., index * rank : (index + 1) * rank]
            y.view(variants, -1, y.shape[-1]).baddbmm_(h_skr, b_sor.to(x.dtype).mT)
            outputs.append(y)
        ctx.save_for_backward(x, h_skc)  # and not the factors: see packed.LowRank
        ctx.group, ctx.weights, ctx.passage = group, weights, passage
        ctx.scale_s = group.window.scale_S
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h_skc = ctx.saved_tensors
        weights, rank = ctx.weights, ctx.weights.rank
        variants, width = h_skc.shape[0], x.shape[-1]
        grad_h_skc = torch.zeros_like(h_skc) if None in grad_outputs else torch.empty_like(h_skc)
        grad_x: Tensor | None = None
        for index, grad_y in enumerate(grad_outputs):
            if grad_y is None:
                continue
            part = slice(index * rank, (index + 1) * rank)
            grad_y_ko = grad_y.reshape(-1, grad_y.shape[-1])
            grad_y_sko = grad_y_ko.view(variants, -1, grad_y.shape[-1])
            b_sro = weights.b_sor[index].to(x.dtype).mT.contiguous()  # small, and twice as fast to multiply with
            grad_h_skc[..., part] = torch.bmm(grad_y_sko, b_sro.mT)
            # h^T g and not g^T h: a product with few rows is several times faster than one with few columns
            weights.grad_b_sor[index].add_(product(h_skc[..., part].mT, grad_y_sko, weights.grad_a_sci.dtype).mT)
            if ctx.needs_input_grad[0]:
                weight_oi = ctx.group.bases[index].weight
                grad_x = grad_y_ko @ weight_oi if grad_x is None else grad_x.addmm_(grad_y_ko, weight_oi)
        grad_h_skc = (grad_h_skc * ctx.scale_s[:, None, None]).to(x.dtype)
        taken = take_out(ctx.passage, grad_h_skc) if ctx.passage is not None else {}
        x_ski = x.reshape(variants, -1, width)
        weights.grad_a_sci.add_(product(grad_h_skc.mT, x_ski, weights.grad_a_sci.dtype))
        grad_x_ski = grad_x.view(variants, -1, width) if grad_x is not None else None
        if grad_x_ski is not None:
            grad_x_ski.baddbmm_(grad_h_skc, weights.a_sci.to(x.dtype))
        if ctx.passage is not None:
            project_back(ctx.passage, ctx.group.names, taken, x_ski, weights.a_sci, weights.grad_a_sci, grad_x_ski)
        return (grad_x.view(x.shape) if grad_x is not None else None), None, None
