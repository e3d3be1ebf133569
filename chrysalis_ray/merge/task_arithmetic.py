"""`task_arithmetic`: a multiple of the sum of the deltas (arXiv 2212.04089)."""

from __future__ import annotations

from torch import Tensor

from chrysalis_ray.config.merges import TaskArithmeticMerge


def scaled_counts(config: TaskArithmeticMerge, weights_N: Tensor, gram_NN: Tensor) -> Tensor:
    """lambda sum_i C_i, with weights lambda N sum_i w_i C_i; lambda is the paper's coefficient, 1/N if not given."""
    return (1.0 if config.coefficient is None else config.coefficient * len(weights_N)) * weights_N
