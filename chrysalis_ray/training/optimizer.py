"""Every variant its own AdamW, schedule and clip, over its own row of the bank.

Nothing here looks at two rows at once: a global norm, a loss scaler or a shared overflow flag would couple variants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from chrysalis_ray.core.records import Hyperparameters
from chrysalis_ray.training.bank import ALIGNMENT

EVICT_AFTER = 3  # non-finite steps in a row


def learning_rate_at(hyperparameters: Hyperparameters, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`: linear warmup, then constant, linear or cosine decay.

    Warmup reaches the peak at its last step; decay would reach zero at step `total_steps`, and stays there.
    """
    peak = hyperparameters.learning_rate
    warmup = round(hyperparameters.warmup_fraction * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if hyperparameters.decay == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    if hyperparameters.decay == "linear":
        return peak * (1.0 - progress)
    if hyperparameters.decay == "constant":
        return peak
    raise ValueError(f"decay {hyperparameters.decay!r} is none of constant, linear, cosine")


class SlotOptimizer:
    """Stock torch AdamW (arXiv 1711.05101) over one row of the bank; the whole adapter is one parameter."""

    def __init__(self, hyperparameters: Hyperparameters, row_P: Tensor, gradient_P: Tensor) -> None:
        self.parameter = nn.Parameter(row_P)
        self.parameter.grad = gradient_P
        self.adamw = torch.optim.AdamW([self.parameter], fused=row_P.is_cuda)
        self.configure(hyperparameters)

    def configure(self, hyperparameters: Hyperparameters) -> None:
        """Take other hyperparameters from the next step on; the moments stay."""
        self.adamw.param_groups[0].update(
            lr=hyperparameters.learning_rate,
            betas=(hyperparameters.beta1, hyperparameters.beta2),
            eps=hyperparameters.epsilon,
            weight_decay=hyperparameters.weight_decay,
        )

    def move(self, row_P: Tensor, gradient_P: Tensor) -> None:
        """Go on with another row, into which the caller has put the weights."""
        self.parameter.data = row_P
        self.parameter.grad = gradient_P

    def step(self, learning_rate: float) -> None:
        self.adamw.param_groups[0]["lr"] = learning_rate
        self.adamw.step()

    @property
    def updates(self) -> int:
        """Updates made: optimizer steps less the skipped ones. It sets AdamW's bias correction."""
        state = self.adamw.state.get(self.parameter)
        return int(state["step"].item()) if state else 0

    def moments(self) -> dict[str, Tensor]:
        """``exp_avg`` and ``exp_avg_sq``, row-shaped; empty before the first update."""
        state = self.adamw.state.get(self.parameter)
        return {name: state[name] for name in ("exp_avg", "exp_avg_sq")} if state else {}

    def restore(self, exp_avg_P: Tensor, exp_avg_sq_P: Tensor, updates: int) -> None:
        """Take over moments that `updates` updates have made."""
        device = self.parameter.device if self.parameter.is_cuda else "cpu"
        self.adamw.state[self.parameter] = {
            "step": torch.tensor(float(updates), dtype=torch.float32, device=device),
            "exp_avg": exp_avg_P,
            "exp_avg_sq": exp_avg_sq_P,
        }


def slot_norms(gradient_NP: Tensor) -> Tensor:
    """Gradient norm of every row, fp64 [N]: norms of short pieces, then the norm of those, so that fp32 rows lose nothing.

    Each row is reduced by itself; what stands beside it does not touch its bits.
    """
    pieces = torch.linalg.vector_norm(gradient_NP.unflatten(1, (-1, ALIGNMENT)), dim=2)
    return torch.linalg.vector_norm(pieces.to(torch.float64), dim=1)


def clip_slots(gradient_NP: Tensor, norms_N: Tensor, clips: Sequence[float]) -> None:
    """Scale every row to its own maximum norm (0: no maximum), as `clip_grad_norm_` does for a model trained alone."""
    limit_N = torch.tensor([clip or math.inf for clip in clips], dtype=norms_N.dtype, device=norms_N.device)
    factor_N = (limit_N / (norms_N + 1e-6)).clamp(max=1.0)
    gradient_NP.mul_(factor_N.to(gradient_NP.dtype)[:, None])
