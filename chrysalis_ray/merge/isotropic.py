"""`isotropic`: the mean with an even spectrum (Iso-C, arXiv 2502.04959), as far as the members differ."""

from __future__ import annotations

import torch
from torch import Tensor

from chrysalis_ray.config.merges import IsotropicMerge
from chrysalis_ray.merge.core_space import NULL


def evened_mean(config: IsotropicMerge, weights_N: Tensor, increments_NPQ: Tensor) -> tuple[Tensor, dict[str, float]]:
    """U ((1 - f) S + f mean(S)) V^T of the mean U S V^T, over its rank, with f from 0 (equal members) to 1 (orthogonal ones).

    f = (1 - |sum_i w_i C_i|^2 / sum_i w_i |C_i|^2) / (1 - sum_i w_i^2). The paper has f = 1 whatever the members are, which
    would change a single adapter; what it is made for, directions that only one member has, shows as f.
    """
    mean_PQ = torch.einsum("n,npq->pq", weights_N, increments_NPQ)
    power = float(weights_N @ (increments_NPQ**2).sum((1, 2)))
    alone = 1.0 - float((weights_N**2).sum())
    if power == 0.0 or alone <= NULL:
        return config.scale * mean_PQ, {}
    apart = min(max((1.0 - float((mean_PQ**2).sum()) / power) / alone, 0.0), 1.0)
    left, values, right_t = torch.linalg.svd(mean_PQ, full_matrices=False)
    heard = values > NULL * values[0]
    even = torch.where(heard, (1.0 - apart) * values + apart * values[heard].mean(), values)
    return config.scale * (left * even) @ right_t, {}
