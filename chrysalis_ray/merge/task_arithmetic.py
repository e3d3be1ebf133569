"""`task_arithmetic`: a multiple of the sum of the deltas (arXiv 2212.04089)."""

from __future__ import annotations

import torch
from torch import Tensor

from chrysalis_ray.config.merges import TaskArithmeticMerge


def scaled_sum(config: TaskArithmeticMerge, weights_N: Tensor, increments_NPQ: Tensor) -> tuple[Tensor, dict[str, float]]:
    """lambda sum_i C_i, with weights lambda N sum_i w_i C_i; lambda is the paper's coefficient, 1/N if not given."""
    members = len(weights_N)
    reach = 1.0 if config.coefficient is None else config.coefficient * members
    return reach * torch.einsum("n,npq->pq", weights_N, increments_NPQ), {}
