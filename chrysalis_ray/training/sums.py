"""Gradients between a backward pass and the step: summed where they lie, or kept apart until all parts can be added in order.

Floating-point sums depend on their order, and an all-reduce adds up in the order of the workers. With virtual workers a
micro-step has a fixed number of parts, whoever computes them; each is a pass of its own shape, its gradients are kept apart,
and the parts are added one after the other. Any number of workers then comes to the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chrysalis_ray.training.engine import Engine


class Sums:
    """The gradients [N, P] of a shard, into which every backward pass adds, and what of them must be kept apart."""

    def __init__(self, engine: Engine, gradients_NP: Tensor) -> None:
        self.engine = engine
        self.gradients_NP = gradients_NP
        shape = (len(engine.parts), *gradients_NP.shape)
        self._parts_VNP = torch.zeros(shape, dtype=gradients_NP.dtype, device=gradients_NP.device) if engine.in_order else None

    def keep(self, place: int) -> None:
        """A pass for the part in this place of the engine's is done."""
        if self._parts_VNP is not None:
            self._parts_VNP[place] += self.gradients_NP
            self.gradients_NP.zero_()

    def close(self, rows: slice) -> None:
        """Sum these rows over all parts and all workers; they begin anew after the step."""
        if self._parts_VNP is None:
            self.engine.reduce(self.gradients_NP[rows])
        else:
            self.gradients_NP[rows] = self.engine.total(self._parts_VNP[:, rows])
            self._parts_VNP[:, rows] = 0.0
