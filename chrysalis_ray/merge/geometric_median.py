"""Weights that a minority cannot move: the geometric median of the deltas, and robust membership on top of it.

The geometric median is the point with the least sum of distances to the members (Weiszfeld 1937). It is a convex combination
of the members, so that its weights make an exact low-rank merge, and up to half of the members can lie anywhere without
carrying it away. All it needs is the Gram matrix of the changes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 1000
SETTLED = 1e-12
NEAR = 1e-6  # of the root mean square length: no member is nearer to the median than that
SPREADS = 3.0  # members further from the others than that many spreads, or distances, are held out
LEAST_SPREAD = 0.01  # of the median loss: differences below are no reason to hold anybody out
NORMAL = 1.4826  # median absolute deviation -> standard deviation


def geometric_median(gram_NN: Tensor) -> Tensor:
    """Weights [N] of the geometric median: the fixed point of w_i ~ 1 / |C_i - sum_j w_j C_j|, from equal weights."""
    size = len(gram_NN)
    weights_N = torch.full((size,), 1.0 / size, dtype=torch.float64)
    least = NEAR * float(gram_NN.diagonal().clamp(min=0.0).mean().sqrt())
    if least == 0.0:
        return weights_N
    for _ in range(ROUNDS):
        inverse_N = 1.0 / distances(gram_NN, weights_N).clamp(min=least)
        moved_N = inverse_N / inverse_N.sum()
        if float((moved_N - weights_N).abs().max()) < SETTLED:
            break
        weights_N = moved_N
    return weights_N


def distances(gram_NN: Tensor, weights_N: Tensor) -> Tensor:
    """|C_i - sum_j w_j C_j| of every member, [N]."""
    towards_N = gram_NN @ weights_N
    return (gram_NN.diagonal() - 2.0 * towards_N + weights_N @ towards_N).clamp(min=0.0).sqrt()


def robust_weights(gram_NN: Tensor, scores: Sequence[float] | None) -> tuple[Tensor, dict[int, str]]:
    """Weights of the geometric median of the members to be trusted, zero for the others, with the reason for each of those.

    Held out are members whose held-out loss lies `SPREADS` standard deviations (from the median absolute deviation) above the
    median, and members more than `SPREADS` times as far from the geometric median as half of the members are. Differences in
    loss below a hundredth of the median are no reason. Both rules leave at least half of the members.
    """
    reasons = _held_out_by_loss(scores) if scores is not None else {}
    trusted = [index for index in range(len(gram_NN)) if index not in reasons]
    own_NN = gram_NN[trusted][:, trusted]
    away = distances(own_NN, geometric_median(own_NN))
    middle = statistics.median(away.tolist())
    least = NEAR * float(own_NN.diagonal().clamp(min=0.0).mean().sqrt())
    for index, distance in zip(trusted, away.tolist(), strict=True):
        if distance > SPREADS * max(middle, least):
            reasons[index] = f"its change lies {distance / max(middle, least):.1f} times as far from the median as the others'"
    trusted = [index for index in trusted if index not in reasons]
    weights_N = torch.zeros(len(gram_NN), dtype=torch.float64)
    weights_N[trusted] = geometric_median(gram_NN[trusted][:, trusted])
    return weights_N, reasons


def _held_out_by_loss(scores: Sequence[float]) -> dict[int, str]:
    middle = statistics.median(scores)
    deviation = NORMAL * statistics.median(abs(score - middle) for score in scores)
    spread = max(deviation, LEAST_SPREAD * abs(middle))
    limit = middle + SPREADS * spread
    return {
        index: f"its held-out loss {score:.4f} is above {limit:.4f}, {SPREADS:g} spreads above the median {middle:.4f}"
        for index, score in enumerate(scores)
        if score > limit and math.isfinite(score)
    }
