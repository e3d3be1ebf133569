"""`regmean`: the delta whose outputs are nearest to every member's, on that member's own inputs (arXiv 2212.09849).

RegMean in the core: restricted to the input directions that the members' changes read, it needs x V instead of x, so that no
[in, in] matrix is ever formed. The data-free `wudi` is the same with every member's delta in place of its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from chrysalis_ray.config.merges import RegmeanMerge
from chrysalis_ray.merge.core_space import canonical_basis


def nearest_outputs(
    config: RegmeanMerge, weights_N: Tensor, increments_NPQ: Tensor, moments_NQQ: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """The C within the members' input directions V that minimises sum_i w_i E_i |(C - C_i) x|^2 + e |C - m|^2, m the mean:

        C = (sum_i w_i C_i H_i + e m) (sum_i w_i H_i + e I)^-1,  H_i = V V^T E_i[x x^T] V V^T,  e = ridge x largest eigenvalue.

    The paper shrinks the off-diagonal of H_i instead, which depends on the basis and is some twenty times too weak for members
    of one seed, whose inputs are nearly the same and whose H_i are ill-conditioned. `moments_NQQ` are the E_i[x x^T] in the
    core. Equal members give the member, a large ridge the mean; members without a common input direction, and a small ridge,
    their sum. Tallies: the squared errors of C and of the mean on the members' inputs.
    """
    mean_PQ = torch.einsum("n,npq->pq", weights_N, increments_NPQ)
    _, right_Ql = canonical_basis(increments_NPQ)
    if not right_Ql.shape[1]:
        return mean_PQ, {}
    changes_NPl = increments_NPQ @ right_Ql
    moments_Nll = right_Ql.T @ moments_NQQ @ right_Ql
    weighted_Nll = weights_N[:, None, None] * moments_Nll
    total_ll = weighted_Nll.sum(0)
    largest = float(torch.linalg.matrix_norm(total_ll, 2))
    if largest == 0.0:  # nothing ever came in
        return mean_PQ, {}
    ridge = config.ridge * largest
    mean_Pl = mean_PQ @ right_Ql
    wanted_Pl = (changes_NPl @ weighted_Nll).sum(0) + ridge * mean_Pl
    regular_ll = total_ll + ridge * torch.eye(len(total_ll), dtype=total_ll.dtype)
    best_Pl = torch.linalg.solve(regular_ll, wanted_Pl.T).T

    def error(change_Pl: Tensor) -> float:
        apart_NPl = change_Pl - changes_NPl
        return float(torch.einsum("npl,nlk,npk->", apart_NPl, weighted_Nll, apart_NPl))

    return best_Pl @ right_Ql.T, {"mean_error": error(mean_Pl), "merged_error": error(best_Pl)}


def regmean_summary(members: int, tallies: Mapping[str, float]) -> dict[str, float]:
    """The error on the members' own inputs beside that of the mean: below 1 is nearer to what every member says."""
    return {"error_to_mean": tallies["merged_error"] / tallies["mean_error"]} if tallies.get("mean_error") else {}
