"""`slerp`: the weighted mean on the sphere (Shoemake 1985; for more than two the Karcher mean), of one module's deltas."""

from __future__ import annotations

import torch
from torch import Tensor

from chrysalis_ray.config.merges import SlerpMerge

ROUNDS = 200
SETTLED = 1e-13
UNDEFINED = 1e-7  # a mean direction shorter than that is none: the deltas cancel


def spherical_mean(config: SlerpMerge, weights_N: Tensor, increments_NPQ: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Mean length sum_i w_i |C_i|, in the direction m with sum_i w_i log_m(C_i/|C_i|) = 0 on the sphere.

    For two deltas of equal length the classic formula, sin((1-t) a)/sin(a) C_1 + sin(t a)/sin(a) C_2 with a the angle between
    them. Iterated in the coefficients of the directions, which the Gram matrix is enough for. Deltas that cancel have no mean
    direction: they return to the seed, as their mean does.
    """
    norms_N = torch.linalg.matrix_norm(increments_NPQ)
    heard = norms_N > 0
    shares_N = weights_N[heard] / weights_N[heard].sum() if bool(heard.any()) else weights_N[heard]
    directions_NPQ = increments_NPQ[heard] / norms_N[heard, None, None]
    flat = directions_NPQ.flatten(1)
    gram_NN = flat @ flat.T
    mean_N = shares_N
    size = float(mean_N @ gram_NN @ mean_N) if len(mean_N) else 0.0
    if size <= UNDEFINED**2:
        return torch.zeros_like(increments_NPQ[0]), {}
    mean_N = mean_N / size**0.5
    for _ in range(ROUNDS):
        cosine_N = (gram_NN @ mean_N).clamp(-1.0, 1.0)
        angle_N = torch.arccos(cosine_N)
        stretch_N = shares_N / torch.sinc(angle_N / torch.pi)  # angle / sin(angle), 1 at 0
        step_N = stretch_N - (stretch_N * cosine_N).sum() * mean_N  # sum_i w_i log_m(u_i), in coefficients
        length = float((step_N @ gram_NN @ step_N).clamp(min=0.0).sqrt())
        if length < SETTLED:
            break
        mean_N = torch.cos(torch.tensor(length)) * mean_N + torch.sin(torch.tensor(length)) / length * step_N
        mean_N = mean_N / float(mean_N @ gram_NN @ mean_N) ** 0.5
    return (weights_N @ norms_N) * torch.einsum("n,npq->pq", mean_N, directions_NPQ), {}
