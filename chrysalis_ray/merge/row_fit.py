"""The best adapter of a rank for a matrix that is only ever seen a block of rows at a time.

Randomised subspace iteration (Halko, Martinsson, Tropp 2011, arXiv 0909.4061) with `POWER` passes; where the basis is as large
as the smaller side it is exact. The squared error is known without another pass, |T|^2 - |Q_R^T T|^2, and is what is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from chrysalis_ray.merge.core_space import NULL, Cut

POWER = 2
MORE = 16  # columns of the random basis beyond the rank
EVEN = 1e-3  # of the longest column: with no direction shorter, a Gram matrix keeps ten of sixteen digits
HELD_ENTRIES = 1 << 24  # a matrix up to here, 64 MiB in fp32, is made once and kept; a larger one is made for every pass
HELD_ROWS = 512  # of a matrix that is kept, taken at a time

Blocks = Callable[[], Iterator[tuple[slice, Tensor]]]


def fit_rows(blocks: Blocks, out_size: int, in_size: int, rank: int, dtype: torch.dtype = torch.float64) -> Cut:
    """A [rank, in], B [out, rank] in fp32 near the best rank-R approximation of the rows, scale 1.

    Multiplies in the rows' own precision, `dtype`; bases are made orthonormal, and the result is cut, in fp64.
    """
    if out_size * in_size <= HELD_ENTRIES:
        blocks = _held(blocks, torch.empty(out_size, in_size, dtype=dtype))
    size = min(rank + MORE, out_size, in_size)
    probe_Is = _random_basis(in_size, size)
    energy = 0.0
    basis_Os = torch.zeros(out_size, size, dtype=torch.float64)
    for turn in range(POWER + 1):
        own_Is = probe_Is.to(dtype)
        for rows, block_bI in blocks():
            basis_Os[rows] = (block_bI @ own_Is).double()
            energy += float(torch.linalg.vector_norm(block_bI)) ** 2 if turn == 0 else 0.0
        basis_Os = _orthonormal(basis_Os)
        own_Os = basis_Os.to(dtype)
        probe_Is = torch.zeros(in_size, size, dtype=torch.float64)
        for rows, block_bI in blocks():
            probe_Is += block_bI.T @ own_Os[rows]
        if turn < POWER:
            probe_Is = _orthonormal(probe_Is)
    left, values, right_t = torch.linalg.svd(probe_Is.T, full_matrices=False)
    kept = int((values[:rank] > NULL * values[0]).sum()) if len(values) else 0
    root_k = values[:kept].sqrt()
    b_or, a_ri = torch.zeros(out_size, rank), torch.zeros(rank, in_size)
    b_or[:, :kept] = basis_Os @ (left[:, :kept] * root_k)
    a_ri[:kept] = root_k[:, None] * right_t[:kept]
    lost = max(energy - float((values[:kept] ** 2).sum()), 0.0)
    return Cut((a_ri, b_or), energy, lost, int((values > NULL * values[:1].sum()).sum()))


@lru_cache(maxsize=8)
def _random_basis(in_size: int, size: int) -> Tensor:
    """The same for all modules of a shape, which are many; to be read only."""
    return torch.randn(in_size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _orthonormal(columns_Ds: Tensor) -> Tensor:
    """Orthonormal columns of the same span: twice by the Cholesky root of their Gram matrix, where that has the digits for it
    (CholeskyQR2, arXiv 1401.4952: as orthonormal as by Householder), which is several times as quick."""
    own_Ds = columns_Ds
    for _ in range(2):
        root_ss, failed = torch.linalg.cholesky_ex(own_Ds.T @ own_Ds)
        sizes_s = root_ss.diagonal()
        if bool(failed) or not float(sizes_s.min()) > EVEN * float(sizes_s.max()):
            return torch.linalg.qr(columns_Ds).Q
        own_Ds = torch.linalg.solve_triangular(root_ss.T, own_Ds, upper=True, left=False)
    return own_Ds


def _held(blocks: Blocks, whole_OI: Tensor) -> Blocks:
    """The same rows, made once and kept in `whole_OI`."""
    for rows, block_bI in blocks():
        whole_OI[rows] = block_bI
    parts = [slice(start, min(start + HELD_ROWS, len(whole_OI))) for start in range(0, len(whole_OI), HELD_ROWS)]
    return lambda: ((rows, whole_OI[rows]) for rows in parts)
