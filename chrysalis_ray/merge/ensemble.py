"""`ensemble`: the weighted mean of the deltas (model soups, arXiv 2203.05482), exact, not of A and B apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def weighted_mean(config: Any, weights_N: Tensor, increments_NPQ: Tensor) -> tuple[Tensor, dict[str, float]]:
    """sum_i w_i C_i, weights summing to one. The anchor adds back what it took, so that it does not matter here."""
    return torch.einsum("n,npq->pq", weights_N, increments_NPQ), {}
