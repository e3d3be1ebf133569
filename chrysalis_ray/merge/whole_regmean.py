"""`regmean` with `space: dense`: RegMean as published (arXiv 2212.09849), on the whole second moments of every member's inputs.

It is solved as a step away from the mean, which is short where members or their inputs are alike, and comes out in the core's
output directions and in input coordinates: no [out, in] delta is formed, and its rank is that of all members together at most.
One [in, in] matrix is summed up, one solved with and one read at a time, 24 x in^2 bytes in all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chrysalis_ray.config.merges import RegmeanMerge
from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.merge.core_space import CoreSpace

ROUNDS = 1000
SETTLED = 1e-13  # of an eigenvalue, between two rounds


def nearest_outputs_of_whole_inputs(
    config: RegmeanMerge, weights_N: Tensor, space: CoreSpace, moment_of: Callable[[int], Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """The change C, [P, I], that minimises sum_i w_i E_i |(C - C_i) x|^2:

        C = m + (sum_i w_i (C_i - m) H_i) (sum_i w_i H_i + e I)^-1,  H_i = a G_i + (1 - a) diag G_i,  e = ridge x eigenvalue,

    with G_i = E_i[x x^T], a = `off_diagonal`, m the mean and the eigenvalue the largest of sum_i w_i H_i. Equal members, and
    equal inputs, give the mean exactly; so does a feature that nothing ever came in at. `moment_of` gives G_i. Tallies: the
    squared errors of C and of the mean on the members' inputs. Raises MergeError where the solve fails.
    """
    increments_NPQ = space.increments_NPQ
    right_IQ = space.right.apply(torch.eye(increments_NPQ.shape[-1], dtype=torch.float64))
    mean_PQ = torch.einsum("n,npq->pq", weights_N, increments_NPQ)
    total_II = torch.zeros(len(right_IQ), len(right_IQ), dtype=torch.float64)
    pull_PI = torch.zeros(len(mean_PQ), len(right_IQ), dtype=torch.float64)
    own_pull_PI, mean_error = torch.zeros_like(pull_PI), 0.0  # of the diagonals alone
    for number, weight in enumerate(weights_N.tolist()):
        apart_PI = weight * (increments_NPQ[number] - mean_PQ) @ right_IQ.T
        moment_II = moment_of(number)
        total_II.add_(moment_II, alpha=weight)
        towards_PI = apart_PI @ moment_II
        pull_PI += towards_PI
        own_pull_PI += apart_PI * moment_II.diagonal()
        mean_error += float((towards_PI * apart_PI).sum()) / weight
        del moment_II
    mean_PI, own_I = mean_PQ @ right_IQ.T, total_II.diagonal().clone()
    if not bool(own_I.any()):  # nothing ever came in
        return mean_PI, {}
    shrink = config.off_diagonal
    shrunk_II = total_II.mul_(shrink)
    shrunk_II.diagonal().copy_(own_I)
    largest = largest_eigenvalue(shrunk_II)
    shrunk_II.diagonal().add_(config.ridge * largest + largest * (own_I == 0.0).to(own_I))
    root_II, failed = torch.linalg.cholesky_ex(shrunk_II)
    if bool(failed):
        raise MergeError("the members' inputs leave directions open, and the ridge is too small to close them",
                         "give a larger ridge, or a smaller off_diagonal")  # fmt: skip
    step_PI = torch.cholesky_solve((shrink * pull_PI + (1.0 - shrink) * own_pull_PI).T, root_II).T
    shrunk_II.diagonal().copy_(shrink * own_I)  # sum_i w_i G_i once more, but for the factor
    bent = float(((step_PI @ shrunk_II) * step_PI).sum()) / shrink
    merged_error = mean_error + bent - 2.0 * float((step_PI * pull_PI).sum())
    return mean_PI + step_PI, {"mean_error": mean_error, "merged_error": max(merged_error, 0.0)}


def largest_eigenvalue(matrix_II: Tensor) -> float:
    """Of a symmetric matrix without negative eigenvalues: Rayleigh quotients of the power method, from a fixed start."""
    vector_I = torch.randn(len(matrix_II), generator=torch.Generator().manual_seed(0), dtype=matrix_II.dtype)
    found = 0.0
    for _ in range(ROUNDS):
        unit_I = vector_I / vector_I.norm()
        vector_I = matrix_II @ unit_I
        before, found = found, float(vector_I @ unit_I)
        if abs(found - before) <= SETTLED * found:
            break
    return found


def looks_at_whole_inputs(config: object) -> bool:
    """Whether a merge goes by whole second moments."""
    return isinstance(config, RegmeanMerge) and config.space == "dense"
