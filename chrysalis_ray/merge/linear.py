"""Merges that are weighted sums of the deltas, from two K x K Gram matrices of each module: no QR, no core.

With the columns of all B and the rows of all A scaled by what their adapter counts, C = B A is the merged delta, and

    G_B = B^T B = L L^T,   G_A = A A^T,   L^T G_A L = W S^2 W^T   =>   V = A^T L W S^-1,   U S = C V,   C = U S V^T.

The first R columns of V span what the best matrix of rank R reads (Eckart-Young). A Gram matrix has half the digits of its
factors, so that V is not trusted: it is made orthonormal once more, and C V is computed from the factors. The result is then
C V V^T, a projection of C itself, and its error sqrt(|C|^2 - |C V|^2) is exact however good V is; what V can spoil is how near
that error is to the least possible one, and only in second order. Where directions so faint are asked for that they drown in
the rounding of G, or members cancel, there is no answer (None): the core, with its QR, is for that. Shapes as in `core_space`.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from chrysalis_ray.merge.core_space import NULL, Cut
from chrysalis_ray.merge.gram import Stack

ROUNDING = 8.0 * torch.finfo(torch.float64).eps  # of |G_A| |G_B|: how far off an eigenvalue of L^T G_A L can be
CLEAR = 1e6  # times the rounding: what is kept, and what is lost, must be that large to be told from it
CANCELLED = 0.25  # of the columns' squared lengths: a sum shorter than that is not stored as its columns in fp32

# (config, weights [N], Gram matrix of one module's increments [N, N]) -> what every increment counts in the sum, [N]
Count = Callable[[Any, Tensor, Tensor], Tensor]


def summed(count: Count) -> Callable[[Any, Tensor, Tensor], tuple[Tensor, Mapping[str, float]]]:
    """The same merge in the core: (config, weights [N], increments [N, P, Q]) -> [P, Q]."""

    def combine(config: Any, weights_N: Tensor, increments_NPQ: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        flat = increments_NPQ.flatten(1)
        return torch.einsum("n,npq->pq", count(config, weights_N, flat @ flat.T), increments_NPQ), {}

    return combine


@dataclass(frozen=True)
class LowRank:
    """B [O, R] and A [R, I] in fp64, the squared norms of the sum and of what B A lacks of it, and the rank of the sum."""

    b_OR: Tensor
    a_RI: Tensor
    energy: float
    lost: float
    available_rank: int


def best_of_rank(stack: Stack, counts_K: Tensor, rank: int) -> LowRank | None:
    """The best matrix of rank R for sum_k counts_k b_k a_k; None where this way of computing cannot tell.

    With a rank for all columns these are the result themselves, nothing is cut and R is their number.
    """
    b_norm_K, a_norm_K = stack.b_KK.diagonal().sqrt(), stack.a_KK.diagonal().sqrt()
    size_K = counts_K.abs() * b_norm_K * a_norm_K
    sizes = size_K.tolist()
    if not math.isfinite(sum(sizes)) or not any(sizes):
        return None
    if not all(sizes):
        live = size_K > 0.0
        some = replace(
            stack,
            b_OK=stack.b_OK[:, live],
            a_KI=stack.a_KI[live],
            b_KK=stack.b_KK[live][:, live],
            a_KK=stack.a_KK[live][:, live],
        )
        return best_of_rank(some, counts_K[live], rank)
    root_K = size_K.sqrt()
    b_scale_K, a_scale_K = root_K / b_norm_K, counts_K.sign() * root_K / a_norm_K  # both sides as long as each other
    b_KK, a_KK = stack.b_KK * b_scale_K * b_scale_K[:, None], stack.a_KK * a_scale_K * a_scale_K[:, None]
    energy = float(torch.vdot(b_KK.view(-1), a_KK.view(-1)))
    rounding = ROUNDING * float(torch.linalg.vector_norm(b_KK)) * float(torch.linalg.vector_norm(a_KK))
    root_KK = _root(b_KK)
    if root_KK is None or energy < CLEAR * rounding:
        return None
    small_KK = root_KK.T @ a_KK @ root_KK
    heard = max(rounding, NULL**2 * energy)
    if rank >= len(counts_K):
        if energy < CANCELLED * sum(size * size for size in sizes):
            return None
        available = int((torch.linalg.eigvalsh(small_KK) > heard).sum())
        return LowRank(stack.b_OK * b_scale_K, a_scale_K[:, None] * stack.a_KI, energy, 0.0, available)
    values_K, vectors_KK = torch.linalg.eigh(small_KK)
    values = values_K.tolist()  # the smallest first
    if min(values[-rank], sum(values[:-rank])) < CLEAR * rounding:
        return None
    s_R, vectors_KR = values_K[-rank:].flip(0).sqrt_(), vectors_KK[:, -rank:].flip(1)
    even_R = s_R.sqrt()
    v_IR = stack.a_KI.T @ (root_KK @ vectors_KR.div_(s_R)).mul_(a_scale_K[:, None])
    newton_RR = torch.addmm(torch.eye(rank, dtype=torch.float64), v_IR.T, v_IR, beta=1.5, alpha=-0.5)  # squares V^T V's error
    heard_KR = (stack.a_KI @ v_IR) @ (newton_RR / even_R)
    b_OR = stack.b_OK @ heard_KR.mul_((b_scale_K * a_scale_K)[:, None])
    kept = (torch.linalg.vector_norm(b_OR, dim=0).square_() @ s_R).item()
    return LowRank(b_OR, (newton_RR * even_R).T @ v_IR.T, energy, max(energy - kept, 0.0), len(values) - bisect(values, heard))


def sum_cut_to_rank(stack: Stack, counts_K: Tensor, rank: int) -> Cut | None:
    """The best rank-R factors of sum_k counts_k b_k a_k in fp32, as `cut_to_rank` gives them for a core; None: ask the core."""
    best = best_of_rank(stack, counts_K, rank)
    if best is None:
        return None
    a_ri, b_or = best.a_RI.float(), best.b_OR.float()
    short = rank - len(a_ri)
    if short:
        a_ri, b_or = torch.nn.functional.pad(a_ri, (0, 0, 0, short)), torch.nn.functional.pad(b_or, (0, short))
    return Cut((a_ri, b_or), best.energy, best.lost, best.available_rank)


def _root(gram_KK: Tensor) -> Tensor | None:
    """L with L L^T = G, or G with as much added as rounding has changed in it, where G is singular."""
    root_KK, failed = torch.linalg.cholesky_ex(gram_KK)
    if bool(failed):
        shift = ROUNDING * len(gram_KK) * float(gram_KK.diagonal().max())
        root_KK, failed = torch.linalg.cholesky_ex(gram_KK + shift * torch.eye(len(gram_KK), dtype=gram_KK.dtype))
    return None if bool(failed) else root_KK
