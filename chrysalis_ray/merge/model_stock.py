"""`model_stock`: the mean, drawn back towards the seed (arXiv 2403.19522), of one module's deltas."""

from __future__ import annotations

import torch
from torch import Tensor

from chrysalis_ray.config.merges import ModelStockMerge


def model_stock(config: ModelStockMerge, weights_N: Tensor, increments_NPQ: Tensor) -> tuple[Tensor, dict[str, float]]:
    """t sum_i w_i C_i with t = N c / (1 + (N-1) c), c the mean cosine between two members, at least 0.

    Equal members have c = 1 and t = 1; members that have nothing in common return to the seed.
    """
    mean_PQ = torch.einsum("n,npq->pq", weights_N, increments_NPQ)
    norms_N = torch.linalg.matrix_norm(increments_NPQ)
    directions_NPQ = increments_NPQ[norms_N > 0] / norms_N[norms_N > 0, None, None]
    members = len(directions_NPQ)
    if members < 2:
        return mean_PQ, {}
    total = float((directions_NPQ.sum(0) ** 2).sum())  # N + N (N-1) c
    cosine = min(max((total - members) / (members * (members - 1)), 0.0), 1.0)
    return members * cosine / (1.0 + (members - 1) * cosine) * mean_PQ, {}
