"""`consensus`: only what the population agrees on survives; the rest stays as it was in the seed.

A gate on coefficients of the change from the seed, between sign election (TIES, arXiv 2306.01708) and consensus masks (TALL,
arXiv 2405.07813), moved from the dense delta into the canonical core, where it keeps the rank low and does not depend on how
an adapter is factored. It is a safety semantics (what nobody else supports does not ship), not a promise of a lower loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from chrysalis_ray.config.merges import ConsensusMerge
from chrysalis_ray.merge.core_space import NULL, canonical_basis

ROUNDING = 1e-9  # agreement within rounding is agreement
FAINT = 1e-6  # what fp32 leaves of a zero, beside another member's coefficient


def agreed_mean(config: ConsensusMerge, weights_N: Tensor, increments_NPQ: Tensor) -> tuple[Tensor, Mapping[str, float]]:
    """The weighted mean where the members agree, zero (the seed) elsewhere.

    In the canonical basis (U, V) with coefficients c_i = U^T C_i V and mean m = sum_i w_i c_i, a coefficient survives if

        |{i: sign c_i = sign m}| >= support N      and      |sum_i w_i c_i| >= coherence sum_i w_i |c_i|.

    A coefficient a million times smaller than another member's is the rounding of a stored adapter, and no vote. support 0
    and coherence 0 give the exact mean; equal members, and a single one, give the member. Also returns tallies that add up
    over modules: coefficients, survivors, unanimous signs, and the squared norms of mean and survivors.
    """
    left_Pk, right_Ql = canonical_basis(increments_NPQ)
    c_Nkl = left_Pk.T @ increments_NPQ @ right_Ql
    mean_kl = torch.einsum("n,nkl->kl", weights_N, c_Nkl)
    spread_kl = torch.einsum("n,nkl->kl", weights_N, c_Nkl.abs())
    noise = NULL * float(c_Nkl.abs().max()) if c_Nkl.numel() else 0.0
    loudest_kl = c_Nkl.abs().amax(0)
    speaks_Nkl = c_Nkl.abs() > (FAINT * loudest_kl).clamp(min=noise)
    votes_kl = (speaks_Nkl & (c_Nkl.sign() == mean_kl.sign())).sum(0)
    members = len(weights_N)
    supported = votes_kl >= math.ceil(config.support * members - ROUNDING)
    coherent = mean_kl.abs() >= (config.coherence - ROUNDING) * spread_kl
    survivors_kl = torch.where(supported & coherent, mean_kl, 0.0)
    heard = loudest_kl > noise
    tallies = {
        "coefficients": float(heard.sum()),
        "survivors": float((supported & coherent & heard).sum()),
        "unanimous": float(((votes_kl == members) & heard).sum()),
        "mean_energy": float((mean_kl**2).sum()),
        "survivor_energy": float((survivors_kl**2).sum()),
        "unanimous_energy": float((mean_kl[votes_kl == members] ** 2).sum()),
    }
    return left_Pk @ survivors_kl @ right_Ql.T, tallies


def consensus_summary(members: int, tallies: Mapping[str, float]) -> dict[str, float]:
    """What survived, and how far the agreement lies above 2^(1-N), that of members who toss coins."""
    if not tallies.get("mean_energy"):  # one member, or none that moved: there was nothing to disagree about
        return {"survived_energy": 1.0, "survived_coefficients": 1.0}
    return {
        "survived_energy": tallies["survivor_energy"] / tallies["mean_energy"],
        "survived_coefficients": tallies["survivors"] / tallies["coefficients"],
        "sign_agreement": tallies["unanimous"] / tallies["coefficients"],
        "sign_agreement_energy": tallies["unanimous_energy"] / tallies["mean_energy"],
        "sign_agreement_by_chance": 2.0 ** (1 - members),
    }
