"""`tsv`: task singular vectors (arXiv 2412.00081): the deltas' singular directions, made orthogonal before they are summed."""

from __future__ import annotations

import torch
from torch import Tensor

from chrysalis_ray.config.merges import TsvMerge

FAINT = 1e-6  # singular values this much weaker than a member's strongest are the rounding of a stored adapter


def orthogonalised_sum(config: TsvMerge, weights_N: Tensor, increments_NPQ: Tensor) -> tuple[Tensor, dict[str, float]]:
    """sum_i N w_i S_i over directions made orthogonal: U = [U_1 .. U_N], V alike, C = U' diag(N w_i S_i) V'^T, U' near U.

    Orthogonal members give the paper's sum. The paper takes U' = P Q^T of the singular value decomposition U = P D Q^T, which
    forces twins apart: three equal members would come back 1.7 times as long and turned by 55 degrees. Here U' = P f(D) Q^T
    with f(d) = min(1, d / floor): what stands nearly at right angles is treated as in the paper, what is nearly the same counts
    once, and equal members give the member.
    """
    lefts, rights, sizes = [], [], []
    for weight, increment_PQ in zip(weights_N, increments_NPQ, strict=True):
        left, values, right_t = torch.linalg.svd(increment_PQ, full_matrices=False)
        kept = values > FAINT * values[:1].sum() if len(values) else values.bool()
        lefts.append(left[:, kept])
        rights.append(right_t[kept].T)
        sizes.append(len(weights_N) * weight * values[kept])
    left_PK = nearly_orthogonal(torch.cat(lefts, dim=1), config.floor)
    right_QK = nearly_orthogonal(torch.cat(rights, dim=1), config.floor)
    return config.scale * (left_PK * torch.cat(sizes)) @ right_QK.T, {}


def nearly_orthogonal(columns_PK: Tensor, floor: float) -> Tensor:
    """P min(1, D / floor) Q^T of the columns' singular value decomposition P D Q^T."""
    if not columns_PK.numel():
        return columns_PK
    left, values, right_t = torch.linalg.svd(columns_PK, full_matrices=False)
    return (left * (values / floor).clamp(max=1.0)) @ right_t
