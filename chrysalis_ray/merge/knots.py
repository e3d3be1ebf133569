"""Rules on single coefficients in the space of KnOTS (arXiv 2410.19735): aligned on the left, input coordinates on the right.

    [dW_1 | .. | dW_N] = U S [V_1^T | .. | V_N^T],        merged = U S rule(V_1^T, .., V_N^T)

from the core, so that no dense delta and no [out, N in] matrix is formed: with dW_i = Q_B C_i Q_A^T the decomposition is that
of [C_1 | .. | C_N]. A rule sees V_i^T, [k, in], in whose rows all members use the same directions of the output. U and S are
those of the deltas whatever the factors are; the sign of a row is that of all members alike, and rules do not mind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chrysalis_ray.merge.core_space import NULL, CoreSpace, Cut
from chrysalis_ray.merge.elementwise import Rule, generator_of, places_of, rule_tallies, whole_block

FAINT = 1e-6  # singular values this much weaker than the strongest are the rounding of stored adapters


def ruled_knots(
    rule: Rule, config: Any, weights_N: Tensor, space: CoreSpace, draw: int, rank: int
) -> tuple[Cut, Mapping[str, float]]:
    """The rule in the space of KnOTS, with the anchor, cut to `rank` (Eckart-Young): a matrix of at most k + anchor ranks."""
    increments_NPQ = space.increments_NPQ
    right_IQ = space.right.apply(torch.eye(increments_NPQ.shape[-1], dtype=torch.float64))
    left, values, right_t = torch.linalg.svd(increments_NPQ.permute(1, 0, 2).flatten(1), full_matrices=False)
    heard = int((values > FAINT * values[0]).sum())
    v_Nkq = right_t[:heard].unflatten(1, (len(increments_NPQ), -1)).permute(1, 0, 2)
    v_NkI = v_Nkq @ right_IQ.T
    places = places_of(torch.linalg.matrix_norm(increments_NPQ))
    block = whole_block(config, v_NkI, weights_N, [generator_of(draw, place, 0) for place in places])
    change_PI = (left[:, :heard] * values[:heard]) @ rule(config, block)
    mean_PI = torch.einsum("n,npq->pq", weights_N, increments_NPQ) @ right_IQ.T
    return cut_rows(space, space.anchor_PQ @ right_IQ.T + change_PI, rank), rule_tallies(change_PI, mean_PI)


def cut_rows(space: CoreSpace, merged_PI: Tensor, rank: int) -> Cut:
    """`cut_to_rank` of Q_B merged, whose input side is in input coordinates already."""
    left, values, right_t = torch.linalg.svd(merged_PI, full_matrices=False)
    available = int((values > NULL * values[0]).sum()) if len(values) else 0
    kept = min(rank, available)
    root_k = values[:kept].sqrt()
    b_ok = space.left.apply(left[:, :kept] * root_k)
    b_or, a_ri = torch.zeros(len(b_ok), rank), torch.zeros(rank, right_t.shape[1])
    b_or[:, :kept] = b_ok
    a_ri[:kept] = root_k[:, None] * right_t[:kept]
    return Cut((a_ri, b_or), float((values**2).sum()), float((values[kept:] ** 2).sum()), available)
