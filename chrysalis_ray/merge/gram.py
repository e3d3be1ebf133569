"""Lengths of deltas and the angles between them, from the factors alone.

    <s_i B_i A_i, s_j B_j A_j> = s_i s_j tr((B_i^T B_j)(A_j A_i^T)) = s_i s_j sum_pq (B_i^T B_j)_pq (A_i A_j^T)_pq

With all B side by side and all A on top of each other that is one product of two K x K matrices, entry by entry, summed over
blocks: no dense delta, no QR. Shapes as in `core_space`; the anchor is one more adapter, and what comes out are the inner
products of the changes from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from chrysalis_ray.merge.core_space import Factors, check_module
from chrysalis_ray.merge.side_by_side import in_order

Adapter = Mapping[str, Factors]


@dataclass(frozen=True)
class Stack:
    """One module of several adapters: all B side by side, all A on top of each other, fp64, and their Gram matrices."""

    b_OK: Tensor
    a_KI: Tensor
    b_KK: Tensor  # B^T B
    a_KK: Tensor  # A A^T
    owner_K: Tensor  # whose column it is

    def per_column(self, of_each: Sequence[float] | Tensor) -> Tensor:
        """One number of every adapter's own, at each of its columns: [K]."""
        return torch.as_tensor(of_each, dtype=torch.float64)[self.owner_K]

    def gram(self, scales: Sequence[float]) -> Tensor:
        """Inner products [M, M] of the M adapters' deltas, `scales` folded in."""
        product_KK = self.b_KK * self.a_KK
        rows_MK = product_KK.new_zeros(len(scales), len(product_KK)).index_add_(0, self.owner_K, product_KK)
        gram_MM = product_KK.new_zeros(len(scales), len(scales)).index_add_(1, self.owner_K, rows_MK)
        scale_M = torch.tensor(scales, dtype=torch.float64)
        return gram_MM.mul_(scale_M).mul_(scale_M[:, None])


def stack(blocks: Sequence[Factors | None]) -> Stack | None:
    """The blocks of one module stacked; None is an adapter without it. None if nobody has it."""
    heard = [(number, *block) for number, block in enumerate(blocks) if block is not None]
    if not heard:
        return None
    b_OK, a_KI = _joined([b_or for _, _, b_or in heard], 1), _joined([a_ri for _, a_ri, _ in heard], 0)
    owner_K = _owners(tuple((number, a_ri.shape[0]) for number, a_ri, _ in heard))
    return Stack(b_OK, a_KI, _square(b_OK.T), _square(a_KI), owner_K)


def _joined(sides: Sequence[Tensor], dim: int) -> Tensor:
    """Matrices one after the other along `dim`, in fp64. By numpy, which turns fp32 into fp64 on the way, in one pass."""
    known = [side if side.dtype in (torch.float32, torch.float64) else side.float() for side in sides]
    return torch.from_numpy(np.concatenate([side.numpy(force=True) for side in known], axis=dim, dtype=np.float64))


@lru_cache(maxsize=64)
def _owners(ranks: tuple[tuple[int, int], ...]) -> Tensor:
    """The number of every adapter, as often as its rank."""
    return torch.tensor([number for number, rank in ranks for _ in range(rank)])


def _square(rows_KD: Tensor) -> Tensor:
    """X X^T, [K, K]; of the two halves off its diagonal, which are equal, one is computed."""
    half = len(rows_KD) // 2
    columns_DK, square_KK = rows_KD.T, rows_KD.new_empty(len(rows_KD), len(rows_KD))
    left_Kh, right_Kk = square_KK.tensor_split([half], dim=1)
    torch.mm(rows_KD, columns_DK[:, :half], out=left_Kh)
    torch.mm(rows_KD[half:], columns_DK[:, half:], out=right_Kk[half:])
    right_Kk[:half] = left_Kh[half:].T
    return square_KK


def gram_of_changes(members: Sequence[Adapter], scales: Sequence[float], anchor: Adapter | None, anchor_scale: float) -> Tensor:
    """Inner products [N, N] of the members' changes from the anchor, over the whole adapter.

    Raises MergeError for shapes that differ and values that are not finite.
    """

    def of_module(module: str) -> Tensor:
        blocks, seed = [member.get(module) for member in members], anchor.get(module) if anchor else None
        check_module(module, [*blocks, seed])
        return gram_of_module(blocks, scales, seed, anchor_scale)

    gram_NN = torch.zeros(len(members), len(members), dtype=torch.float64)
    for own_NN in in_order(of_module, sorted({module for member in members for module in member} | set(anchor or {}))):
        gram_NN += own_NN
    return gram_NN


def gram_of_module(
    members: Sequence[Factors | None], scales: Sequence[float], anchor: Factors | None, anchor_scale: float
) -> Tensor:
    """Inner products [N, N] of the members' changes from the anchor in one module; None is a delta of zero."""
    stacked = stack([*members, anchor])
    if stacked is None:
        return torch.zeros(len(members), len(members), dtype=torch.float64)
    return minus_the_last(stacked.gram([*scales, anchor_scale]))


def minus_the_last(gram_MM: Tensor) -> Tensor:
    """Inner products of every vector's difference from the last one, without the last: [M-1, M-1]."""
    rows_NM = gram_MM[:-1] - gram_MM[-1]
    return rows_NM[:, :-1] - rows_NM[:, -1:]


def cosines(gram_NN: Tensor) -> Tensor:
    """Cosines between the members' changes; a member that did not change has 0."""
    norms_N = gram_NN.diagonal().clamp(min=0.0).sqrt()
    norms_N = torch.where(norms_N > 0, norms_N, torch.inf)
    return gram_NN / norms_N[:, None] / norms_N
