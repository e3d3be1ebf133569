"""`model_stock`: the mean, drawn back towards the seed (arXiv 2403.19522), of one module's deltas."""

from __future__ import annotations

from torch import Tensor

from chrysalis_ray.config.merges import ModelStockMerge


def stock_counts(config: ModelStockMerge, weights_N: Tensor, gram_NN: Tensor) -> Tensor:
    """t w_i with t = N c / (1 + (N-1) c), c the mean cosine between two members that moved, at least 0.

    Equal members have c = 1 and t = 1; members that have nothing in common return to the seed.
    """
    norms_N = gram_NN.diagonal().clamp(min=0.0).sqrt()
    heard = norms_N > 0
    members = int(heard.sum())
    if members < 2:
        return weights_N
    total = float((gram_NN[heard][:, heard] / norms_N[heard] / norms_N[heard, None]).sum())  # N + N (N-1) c
    cosine = min(max((total - members) / (members * (members - 1)), 0.0), 1.0)
    return members * cosine / (1.0 + (members - 1) * cosine) * weights_N
