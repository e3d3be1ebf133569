"""`slerp`: the weighted mean on the sphere (Shoemake 1985; for more than two the Karcher mean), of one module's deltas."""

from __future__ import annotations

import torch
from torch import Tensor

from chrysalis_ray.config.merges import SlerpMerge

ROUNDS = 200
SETTLED = 1e-13
UNDEFINED = 1e-7  # a mean direction shorter than that is none: the deltas cancel


def spherical_counts(config: SlerpMerge, weights_N: Tensor, gram_NN: Tensor) -> Tensor:
    """What every delta C_i counts in the mean of length sum_i w_i |C_i|, whose direction m has sum_i w_i log_m(C_i/|C_i|) = 0.

    For two deltas of equal length the classic formula, sin((1-t) a)/sin(a) C_1 + sin(t a)/sin(a) C_2 with a the angle between
    them. Iterated in the coefficients of the directions, which the Gram matrix is enough for. Deltas that cancel have no mean
    direction: they return to the seed, as their mean does.
    """
    norms_N = gram_NN.diagonal().clamp(min=0.0).sqrt()
    heard = norms_N > 0
    counts_N = torch.zeros_like(weights_N)
    shares_N = weights_N[heard] / weights_N[heard].sum() if bool(heard.any()) else weights_N[heard]
    directions_NN = gram_NN[heard][:, heard] / norms_N[heard] / norms_N[heard, None]
    mean_N = shares_N
    size = float(mean_N @ directions_NN @ mean_N) if len(mean_N) else 0.0
    if size <= UNDEFINED**2:
        return counts_N
    mean_N = mean_N / size**0.5
    for _ in range(ROUNDS):
        cosine_N = (directions_NN @ mean_N).clamp(-1.0, 1.0)
        angle_N = torch.arccos(cosine_N)
        stretch_N = shares_N / torch.sinc(angle_N / torch.pi)  # angle / sin(angle), 1 at 0
        step_N = stretch_N - (stretch_N * cosine_N).sum() * mean_N  # sum_i w_i log_m(u_i), in coefficients
        length = float((step_N @ directions_NN @ step_N).clamp(min=0.0).sqrt())
        if length < SETTLED:
            break
        mean_N = torch.cos(torch.tensor(length)) * mean_N + torch.sin(torch.tensor(length)) / length * step_N
        mean_N = mean_N / float(mean_N @ directions_NN @ mean_N) ** 0.5
    counts_N[heard] = (weights_N @ norms_N) * mean_N / norms_N[heard]
    return counts_N
