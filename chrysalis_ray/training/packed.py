"""A linear module that serves every live variant at once.

    y = W x            the frozen base, one GEMM over the tokens of all variants
    h = s A x          one batched GEMM, each variant its own A
    y = y + B h        one batched GEMM with the addition fused

    x_SKI   variants x tokens x in      h_SKR   variants x tokens x rank      y_SKO   variants x tokens x out

Activations arrive variant-major, [variants * rows, T, in], so that regrouping them per variant is free.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.seed.linear import linear_shape
from chrysalis_ray.training.bank import Target, Window
from chrysalis_ray.training.dropout import Passage, product, project_back, project_down, take_out
from chrysalis_ray.training.folded import folded
from chrysalis_ray.training.fused import TOGETHER, Group


class LowRank(torch.autograd.Function):
    """y + B (s A x) per variant, saving x and h alone (LoRA, arXiv 2106.09685).

    Weights are kept in the bank's precision and cast to that of the activations here; gradients return in the bank's.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a_sri: Tensor, b_sor: Tensor, scale_s: Tensor, passage: Passage | None, name: str
    ) -> Tensor:
        variants = a_sri.shape[0]
        x_ski = x.reshape(variants, -1, x.shape[-1])
        h_skr = torch.bmm(x_ski, a_sri.to(x.dtype).mT)
        if passage is not None:
            project_down(passage, [name], x_ski, a_sri[:, None], h_skr)
        h_skr = _scaled(h_skr, scale_s)
        ctx.passage, ctx.name = passage, name
        ctx.save_for_backward(x, h_skr)
        # Not saved: all rows of the bank share a version, and other threads move theirs meanwhile. Ours wait for this pass.
        ctx.factors = a_sri, b_sor, scale_s
        y_sko = y.reshape(variants, -1, y.shape[-1])
        return torch.baddbmm(y_sko, h_skr, b_sor.to(x.dtype).mT).view(y.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grad_outputs
        x, h_skr = ctx.saved_tensors
        a_sri, b_sor, scale_s = ctx.factors
        variants = a_sri.shape[0]
        x_ski = x.reshape(variants, -1, x.shape[-1])
        grad_y_sko = grad_y.reshape(variants, -1, grad_y.shape[-1])
        grad_h_skr = _scaled(torch.bmm(grad_y_sko, b_sor.to(grad_y.dtype)), scale_s)
        taken = take_out(ctx.passage, grad_h_skr) if ctx.passage is not None else {}
        grad_a_sri = product(grad_h_skr.mT, x_ski, a_sri.dtype)
        grad_b_sor = product(h_skr.mT, grad_y_sko, b_sor.dtype).mT  # few rows multiply faster than few columns
        grad_x_ski = torch.bmm(grad_h_skr, a_sri.to(x.dtype)) if ctx.needs_input_grad[1] else None
        if ctx.passage is not None:
            project_back(ctx.passage, [ctx.name], taken, x_ski, a_sri[:, None], grad_a_sri[:, None], grad_x_ski)
        grad_x = grad_x_ski.view(x.shape) if grad_x_ski is not None else None
        return grad_y, grad_x, grad_a_sri, grad_b_sor, None, None, None


def _scaled(h_skr: Tensor, scale_s: Tensor) -> Tensor:
    """h times its variant's scale, which is never rounded to a lower precision first."""
    return (h_skr * scale_s[:, None, None]).to(h_skr.dtype)


class PackedLinear(nn.Module):
    """A frozen linear module and, for every variant in its window, a low-rank path beside it."""

    def __init__(self, base: nn.Module, name: str, window: Window) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.window = window  # no nn.Module: the bank is never registered, moved or sharded with the base
        self.group: Group | None = None  # whom it is computed with, where the frozen weights lie whole on this worker

    def forward(self, x: Tensor) -> Tensor:
        if self.window.blend is not None:
            return self.window.blend.output(self.name, x, self.base)
        if self.group is not None:
            return self.group.output(self.name, x)
        y = self.base(x)
        factors, scale_S, passage = self.window.factors(self.name), self.window.scale_S(self.name), self.window.passage
        if len(factors) == 1:
            return LowRank.apply(y, x, *factors[0], scale_S, passage, self.name)
        rows = [bucket.rows for bucket in self.window.buckets]
        sizes = [len(y) // len(scale_S) * len(a_sri) for a_sri, _ in factors]
        parts = zip(y.split(sizes), x.split(sizes), factors, rows, strict=True)
        return torch.cat(
            [
                LowRank.apply(y, x, *own, scale_S[row], passage.part(row) if passage else None, self.name)
                for y, x, own, row in parts
            ]
        )

    def worn(self, lane: int) -> Tensor:
        """The weight of the frozen linear module with the change of one lane added to it."""
        weight_oi = self.base.weight
        assert isinstance(weight_oi, Tensor)
        change = self.change(lane)
        return weight_oi if change is None else folded(weight_oi, *change)

    def change(self, lane: int) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r], times its scale, of one lane; None where a blend changes nothing."""
        blend = self.window.blend
        if blend is not None:
            return blend.change(self.name, lane)
        bucket, (a_sri, b_sor) = self.window.factors_of(self.name, lane)
        place = lane - bucket.rows.start
        return a_sri[place], b_sor[place] * self.window.scale_S(self.name)[lane]


def find_targets(model: nn.Module, targets: Iterable[str], section: str = "lora") -> list[Target]:
    """The linear modules that `targets` (leaf names or dotted endings) mean, in module order.

    Raises ModelError for a target that is missing or not linear, listing the linear leaf names the model has.
    """
    modules = dict(model.named_modules())
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {name: shape for name, m in modules.items() if (shape := linear_shape(m)) is not None and m is not head}
    wanted = tuple(targets)
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
    for target in wanted:
        matches = [name for name in modules if _means(target, name)]
        if not matches:
            raise ModelError(
                f"{section}.targets names {target!r}, which the base does not have", f"its linear modules: {leaves}"
            )
        odd = [name for name in matches if name not in linear]
        if odd:
            kind = type(modules[odd[0]]).__name__
            raise ModelError(
                f"{section}.targets names {target!r}, but {odd[0]!r} is a {kind} that carries no adapter",
                f"its linear modules: {leaves}",
            )
    return [
        Target(name, in_features, out_features)
        for name, (out_features, in_features) in linear.items()
        if any(_means(target, name) for target in wanted)
    ]


def fuse(model: nn.Module, window: Window) -> None:
    """Compute packed layers by their frozen weights, those that read the same x together: for a trunk that is whole here."""
    for parent in list(model.modules()):
        plain = {leaf: part for leaf, part in parent.named_children() if _is_plain(part)}
        groups = [leaves for leaves in TOGETHER if plain.keys() >= set(leaves)]
        groups = [leaves for leaves in groups if window.bank.neighbours([plain[leaf].name for leaf in leaves])]
        alone = plain.keys() - {leaf for leaves in groups for leaf in leaves}
        for leaves in [*groups, *((leaf,) for leaf in alone)]:
            members = [plain[leaf] for leaf in leaves]
            bases = [member.base for member in members if isinstance(member.base, nn.Linear)]
            group = Group([member.name for member in members], bases, window)
            for member in members:
                member.group = group


def _is_plain(module: nn.Module) -> TypeGuard[PackedLinear]:
    return isinstance(module, PackedLinear) and type(module.base) is nn.Linear


def _means(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def inject(model: nn.Module, window: Window) -> None:
    """Freeze the model and put a PackedLinear in the place of every target of the window's bank."""
    model.requires_grad_(False)
    for target in window.bank.targets:
        parent, _, leaf = target.name.rpartition(".")
        holder = model.get_submodule(parent)
        base = getattr(holder, leaf)
        setattr(holder, leaf, PackedLinear(base, target.name, window))
