"""`wudi`: the delta that every member's own inputs see as that member's (arXiv 2503.08099), in closed form, with a ridge."""

from __future__ import annotations

import torch
from torch import Tensor

from chrysalis_ray.config.merges import WudiMerge


def least_interference(config: WudiMerge, weights_N: Tensor, increments_NPQ: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The C that minimises sum_i w_i |(C - C_i) C_i^T|^2 / |C_i|^2 + e |C - m|^2, with m the mean:

        C = (sum_i w_i C_i H_i + e m) (sum_i w_i H_i + e I)^-1,    H_i = C_i^T C_i / |C_i|^2,    e = ridge x largest eigenvalue.

    Equal members give the member; members without a common input direction, and a small ridge, give their sum. The paper takes
    300 steps of Adam instead, which is a ridge of its own: without one, members of one seed come out tens of times too long,
    because their sum of H_i is ill-conditioned.
    """
    mean_PQ = torch.einsum("n,npq->pq", weights_N, increments_NPQ)
    power_N = (increments_NPQ**2).sum((1, 2))
    heard = power_N > 0
    if not bool(heard.any()):
        return mean_PQ, {}
    changes_MPQ = increments_NPQ[heard]
    inputs_MQQ = changes_MPQ.transpose(1, 2) @ changes_MPQ / power_N[heard, None, None]
    weighted_MQQ = weights_N[heard, None, None] * inputs_MQQ
    total_QQ = weighted_MQQ.sum(0)
    ridge = config.ridge * float(torch.linalg.matrix_norm(total_QQ, 2))
    wanted_PQ = (changes_MPQ @ weighted_MQQ).sum(0) + ridge * mean_PQ
    regular_QQ = total_QQ + ridge * torch.eye(len(total_QQ), dtype=total_QQ.dtype)
    return torch.linalg.solve(regular_QQ, wanted_PQ.T).T, {}
