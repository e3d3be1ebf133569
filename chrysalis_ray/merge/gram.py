"""Lengths of deltas and the angles between them, from the factors alone.

    <s_i B_i A_i, s_j B_j A_j> = s_i s_j tr((B_i^T B_j)(A_j A_i^T)) = s_i s_j sum_pq (B_i^T B_j)_pq (A_i A_j^T)_pq

With all B side by side and all A on top of each other that is one product of two K x K matrices, entry by entry, summed over
blocks: no dense delta, no QR. Shapes as in `core_space`; the anchor is one more adapter, and what comes out are the inner
products of the changes from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from chrysalis_ray.merge.core_space import Factors, check_module, double

Adapter = Mapping[str, Factors]


def gram_of_changes(members: Sequence[Adapter], scales: Sequence[float], anchor: Adapter | None, anchor_scale: float) -> Tensor:
    """Inner products [N, N] of the members' changes from the anchor, over the whole adapter.

    Raises MergeError for shapes that differ and values that are not finite.
    """
    gram_NN = torch.zeros(len(members), len(members), dtype=torch.float64)
    for module in sorted({module for member in members for module in member} | set(anchor or {})):
        blocks, seed = [member.get(module) for member in members], anchor.get(module) if anchor else None
        check_module(module, [*blocks, seed])
        gram_NN += gram_of_module(blocks, scales, seed, anchor_scale)
    return gram_NN


def gram_of_module(
    members: Sequence[Factors | None], scales: Sequence[float], anchor: Factors | None, anchor_scale: float
) -> Tensor:
    """Inner products [N, N] of the members' changes from the anchor in one module; None is a delta of zero."""
    spoken = [(number, *double(block)) for number, block in enumerate([*members, anchor]) if block is not None]
    gram_MM = torch.zeros(len(members) + 1, len(members) + 1, dtype=torch.float64)  # the anchor comes last
    if not spoken:
        return gram_MM[:-1, :-1]
    every_scale = [*scales, anchor_scale]
    b_OK = torch.cat([every_scale[number] * b_or for number, _, b_or in spoken], dim=1)
    a_KI = torch.cat([a_ri for _, a_ri, _ in spoken], dim=0)
    product_KK = (b_OK.T @ b_OK) * (a_KI @ a_KI.T)
    owner_KM = torch.zeros(len(product_KK), len(members) + 1, dtype=torch.float64)
    start = 0
    for number, a_ri, _ in spoken:
        owner_KM[start : start + len(a_ri), number] = 1.0
        start += len(a_ri)
    gram_MM = owner_KM.T @ product_KK @ owner_KM
    change_NM = torch.eye(len(members) + 1, dtype=torch.float64)[:-1]
    change_NM[:, -1] = -1.0
    return change_NM @ gram_MM @ change_NM.T


def cosines(gram_NN: Tensor) -> Tensor:
    """Cosines between the members' changes; a member that did not change has 0."""
    norms_N = gram_NN.diagonal().clamp(min=0.0).sqrt()
    norms_N = torch.where(norms_N > 0, norms_N, torch.inf)
    return gram_NN / norms_N[:, None] / norms_N
