"""Muon (arXiv 2502.16982) in the precision of its parameters.

torch.optim.Muon orthogonalises in bf16 whatever the parameters are. CPUs without bf16 instructions emulate them: there one
product of two 256 x 256 matrices takes 26 ms instead of 0.3, and a quickstart of two minutes takes a quarter of an hour.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, by K. Jordan
ITERATIONS = 5
TINY = 1e-7


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised by Newton-Schulz and scaled to AdamW's step size; matrices only, no weight decay."""

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float = 1e-3, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                average = state.setdefault("momentum", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                direction = orthogonalised(matrix.grad.lerp(average, group["momentum"]))
                matrix.add_(direction, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


def orthogonalised(update_ij: Tensor) -> Tensor:
    """The matrix with its singular values brought near 1 (between about 0.7 and 1.2)."""
    a, b, c = COEFFICIENTS
    wide = update_ij if update_ij.shape[0] <= update_ij.shape[1] else update_ij.mT
    x = wide / wide.norm().clamp(min=TINY)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is update_ij else x.mT
