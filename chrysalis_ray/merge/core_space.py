"""The stacked low-rank core: N adapters of one module as N small matrices, without loss.

With all B side by side and all A on top of each other, `Q_B R = qr([B_1 .. B_N])` and `Q_A R' = qr([A_1; ..; A_N]^T)`,

    M_i = s_i (Q_B^T B_i) (A_i Q_A),        scale_i B_i A_i = Q_B M_i Q_A^T   exactly.

M_i is at most K x K with K the sum of the ranks, so that any method works on matrices of a few hundred instead of the
dense deltas (Core Space merging, arXiv 2509.17786). The basis (Q_B, Q_A) depends on how an adapter happens to be factored;
a method that looks at single coefficients asks for `canonical_basis`, which depends on the deltas alone.

Shapes: O out, I in, R rank of one adapter, P <= min(O, K) and Q <= min(I, K) core, N adapters. All fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # A_RI, B_OR
NULL = 1e-12  # directions this much weaker than the strongest are rounding, in fp64


@dataclass(frozen=True)
class CoreSpace:
    """One module of a population. `increments_NPQ` are the cores minus the anchor's: what each adapter changed."""

    left_OP: Tensor
    right_IQ: Tensor
    increments_NPQ: Tensor
    anchor_PQ: Tensor


def core_space(
    members: Sequence[Factors | None], scales: Sequence[float], anchor: Factors | None, anchor_scale: float
) -> CoreSpace:
    """The core of one module. None is an adapter without this module: a delta of zero. At least one is not None."""
    blocks = [*members, anchor]
    spoken = [_double(block) for block in blocks if block is not None and bool(block[1].any()) and bool(block[0].any())]
    if not spoken:  # every delta is zero: one empty direction keeps the shapes
        a_ri, b_or = _double(next(block for block in blocks if block is not None))
        spoken = [(torch.zeros_like(a_ri[:1]), torch.zeros_like(b_or[:, :1]))]
    left_OP = torch.linalg.qr(torch.cat([b_or for _, b_or in spoken], dim=1)).Q
    right_IQ = torch.linalg.qr(torch.cat([a_ri for a_ri, _ in spoken], dim=0).T).Q
    empty = torch.zeros(left_OP.shape[1], right_IQ.shape[1], dtype=torch.float64)

    def project(block: Factors | None, scale: float) -> Tensor:
        if block is None:
            return empty
        a_ri, b_or = _double(block)
        return scale * (left_OP.T @ b_or) @ (a_ri @ right_IQ)

    anchor_PQ = project(anchor, anchor_scale)
    cores = [project(block, scale) for block, scale in zip(members, scales, strict=True)]
    return CoreSpace(left_OP, right_IQ, torch.stack(cores) - anchor_PQ, anchor_PQ)


def _double(block: Factors) -> Factors:
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

    Optimal among all rank-R matrices in Frobenius and spectral norm; the energy lost is the sum of the squared singular
    values cut off. Signs are fixed by the largest entry of each left vector.
    """
    left, values, right_t = torch.linalg.svd(merged_PQ, full_matrices=False)
    available = int((values > NULL * values[0]).sum()) if len(values) else 0
    kept = min(rank, available)
    b_ok = space.left_OP @ left[:, :kept]
    signs_k = torch.sign(b_ok.gather(0, b_ok.abs().argmax(0, keepdim=True)))[0] if kept else values[:0]
    root_k = values[:kept].sqrt()
    b_or = torch.zeros(space.left_OP.shape[0], rank)
    a_ri = torch.zeros(rank, space.right_IQ.shape[0])
    b_or[:, :kept] = (b_ok * (signs_k * root_k)).to(torch.float32)
    a_ri[:kept] = ((signs_k * root_k)[:, None] * (right_t[:kept] @ space.right_IQ.T)).to(torch.float32)
    return Cut((a_ri, b_or), float((values**2).sum()), float((values[kept:] ** 2).sum()), available)
