"""The stacked low-rank core: N adapters of one module as N small matrices, without loss.

With all B side by side and all A on top of each other, `Q_B R = qr([B_1 .. B_N])` and `Q_A R' = qr([A_1; ..; A_N]^T)`,

    M_i = s_i (Q_B^T B_i) (A_i Q_A),        s_i B_i A_i = Q_B M_i Q_A^T   exactly.

M_i is at most K x K with K the sum of the ranks, so that any method works on matrices of a few hundred instead of the
dense deltas (Core Space merging, arXiv 2509.17786). The basis (Q_B, Q_A) depends on how an adapter happens to be factored;
a method that looks at single coefficients asks for `canonical_basis`, which depends on the deltas alone.

Shapes: O out, I in, R rank of one adapter, P <= min(O, K) and Q <= min(I, K) core, N adapters. All fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chrysalis_ray.core.errors import MergeError

Factors = tuple[Tensor, Tensor]  # A_RI, B_OR
NULL = 1e-12  # directions this much weaker than the strongest are rounding, in fp64


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns Q [D, P], kept as Householder reflectors: applied, never formed, at half the cost."""

    reflectors_DP: Tensor
    tau_P: Tensor

    def apply(self, coefficients_Pk: Tensor) -> Tensor:
        """Q coefficients, [D, k]."""
        padded_Dk = coefficients_Pk.new_zeros(self.reflectors_DP.shape[0], coefficients_Pk.shape[1])
        padded_Dk[: len(coefficients_Pk)] = coefficients_Pk
        return torch.ormqr(self.reflectors_DP, self.tau_P, padded_Dk)


def orthonormalise(columns_DK: Tensor) -> tuple[Basis, Tensor]:
    """Q and R [P, K] of the columns, P = min(D, K); the block of R below an adapter's columns is Q^T times them."""
    reflectors_DK, tau_P = torch.geqrf(columns_DK)
    size = len(tau_P)
    return Basis(reflectors_DK[:, :size], tau_P), reflectors_DK[:size].triu()


@dataclass(frozen=True)
class CoreSpace:
    """One module of a population. `increments_NPQ` are the cores minus the anchor's: what each adapter changed."""

    left: Basis  # of the out features, P columns
    right: Basis  # of the in features, Q columns
    increments_NPQ: Tensor
    anchor_PQ: Tensor


def core_space(
    members: Sequence[Factors | None], scales: Sequence[float], anchor: Factors | None, anchor_scale: float
) -> CoreSpace:
    """The core of one module. None is an adapter without this module: a delta of zero. At least one is not None."""
    blocks = [*members, anchor]
    heard = [number for number, block in enumerate(blocks) if block is not None and all(bool(side.any()) for side in block)]
    spoken = [double(block) for number in heard if (block := blocks[number]) is not None]
    if not spoken:  # every delta is zero: one empty direction keeps the shapes
        a_ri, b_or = double(next(block for block in blocks if block is not None))
        spoken = [(torch.zeros_like(a_ri[:1]), torch.zeros_like(b_or[:, :1]))]
    left, left_PK = orthonormalise(torch.cat([b_or for _, b_or in spoken], dim=1))
    right, right_QK = orthonormalise(torch.cat([a_ri for a_ri, _ in spoken], dim=0).T)
    cores = torch.zeros(len(blocks), len(left_PK), len(right_QK), dtype=torch.float64)
    start = 0
    for number, (a_ri, _) in zip(heard, spoken, strict=False):  # the empty direction is nobody's
        own = slice(start, start + len(a_ri))
        scale = scales[number] if number < len(members) else anchor_scale
        torch.matmul(scale * left_PK[:, own], right_QK[:, own].T, out=cores[number])
        start = own.stop
    increments_NPQ = cores[:-1] - cores[-1]
    still_N = torch.linalg.matrix_norm(increments_NPQ) <= NULL * torch.linalg.matrix_norm(cores[-1])
    increments_NPQ[still_N] = 0.0  # equal to the anchor but for rounding, which has a direction
    return CoreSpace(left, right, increments_NPQ, cores[-1])


def check_module(module: str, blocks: Sequence[Factors | None]) -> None:
    """Raises MergeError for factors of one module that do not fit together or are not finite."""
    check_shapes(module, blocks)
    check_finite(module, blocks)


def check_shapes(module: str, blocks: Sequence[Factors | None]) -> None:
    """Raises MergeError for factors of one module that do not fit together."""
    shapes = {(block[1].shape[0], block[0].shape[1]) for block in blocks if block is not None}
    if len(shapes) > 1:
        raise MergeError(f"module {module} has the shapes {sorted(shapes)}", "merge adapters of one and the same base")
    for block in blocks:
        if block is None:
            continue
        if block[0].shape[0] != block[1].shape[1]:
            raise MergeError(f"module {module}: A has rank {block[0].shape[0]}, B has rank {block[1].shape[1]}")


def check_finite(module: str, blocks: Sequence[Factors | None]) -> None:
    """Raises MergeError for factors of one module with values that are not finite."""
    for block in blocks:
        if block is not None and not all(is_finite(side) for side in block):
            raise MergeError(f"module {module} holds values that are not finite", "leave out the variant that diverged")


def is_finite(side: Tensor) -> bool:
    """Whether every value is. A value that is not makes the sum one, and a sum is ten times as quick as looking at them all."""
    return math.isfinite(side.sum()) or bool(torch.isfinite(side).all())


def double(block: Factors) -> Factors:
    """The factors in fp64 on the CPU."""
    return block[0].detach().to("cpu", torch.float64), block[1].detach().to("cpu", torch.float64)


def canonical_basis(increments_NPQ: Tensor) -> tuple[Tensor, Tensor]:
    """Bases (U [P, k], V [Q, l]) in which the coefficients of the increments depend on nothing but the increments.

    The eigenvectors of sum_i C_i C_i^T/|C_i|^2 and sum_i C_i^T C_i/|C_i|^2, taken as singular vectors of the stacked C_i/|C_i|
    because that keeps twice the digits; null directions dropped, so that zero rows of an adapter change nothing. Unique up
    to signs where eigenvalues differ; adapters that are both orthogonal and equally spread have no such basis, and share
    an arbitrary one.
    """
    norms_N = torch.linalg.matrix_norm(increments_NPQ)
    unit_NPQ = increments_NPQ[norms_N > 0] / norms_N[norms_N > 0, None, None]
    return _span(unit_NPQ), _span(unit_NPQ.transpose(1, 2))


def _span(unit_NPQ: Tensor) -> Tensor:
    wide = unit_NPQ.permute(1, 0, 2).flatten(1)  # [P, N Q]
    if wide.shape[1] == 0:
        return torch.zeros(wide.shape[0], 0, dtype=torch.float64)
    square = torch.linalg.qr(wide.T, mode="r").R.T if wide.shape[1] > wide.shape[0] else wide
    vectors, values, _ = torch.linalg.svd(square, full_matrices=False)
    return vectors[:, values > NULL * values[0]]


@dataclass(frozen=True)
class Cut:
    """The best rank-R factors of a core (Eckart-Young), padded with zeros to R, scale 1. Energies are squared norms."""

    factors: Factors
    energy: float
    lost: float
    available_rank: int


def cut_to_rank(space: CoreSpace, merged_PQ: Tensor, rank: int) -> Cut:
    """Q_B merged Q_A^T as A [rank, in], B [out, rank] in fp32, the singular values shared evenly between both.

    Optimal among all rank-R matrices in Frobenius and spectral norm; the energy lost is the sum of the squared singular values
    cut off.
    """
    left, values, right_t = torch.linalg.svd(merged_PQ, full_matrices=False)
    available = int((values > NULL * values[0]).sum()) if len(values) else 0
    kept = min(rank, available)
    root_k = values[:kept].sqrt()
    b_ok = space.left.apply(left[:, :kept] * root_k)
    a_ik = space.right.apply(right_t[:kept].T * root_k)
    b_or = torch.zeros(len(b_ok), rank)
    a_ri = torch.zeros(rank, len(a_ik))
    b_or[:, :kept] = b_ok
    a_ri[:kept] = a_ik.T
    return Cut((a_ri, b_or), float((values**2).sum()), float((values[kept:] ** 2).sum()), available)
