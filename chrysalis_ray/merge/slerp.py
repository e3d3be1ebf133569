"""`slerp`: the weighted mean on the sphere (Shoemake 1985; for more than two the Karcher mean), of one module's deltas."""

from __future__ import annotations

import torch
from torch import Tensor

from chrysalis_ray.config.merges import SlerpMerge
from chrysalis_ray.core.errors import MergeError

ROUNDS = 200
SETTLED = 1e-13
UNDEFINED = 1e-7  # a mean direction shorter than that is none: the deltas cancel
PARALLEL = 1e-6  # two deltas at an angle whose sine is smaller are mixed evenly, as the formula does in the limit


def spherical_counts(config: SlerpMerge, weights_N: Tensor, gram_NN: Tensor) -> Tensor:
    """What every delta counts in their mean on the sphere. Raises MergeError for a `pair` that is none."""
    if config.mean == "pair":
        return _pair_counts(weights_N, gram_NN)
    return _chord_counts(weights_N, gram_NN) if config.mean == "chord" else _karcher_counts(weights_N, gram_NN)


def _pair_counts(weights_N: Tensor, gram_NN: Tensor) -> Tensor:
    """sin((1-t) a)/sin(a) of the first, sin(t a)/sin(a) of the second, a the angle between them and t what the second weighs.

    mergekit's nuslerp around a base (merge_methods/nuslerp.py, flattened). Parallel and opposite deltas are mixed evenly.
    """
    if len(weights_N) == 1:
        return torch.ones_like(weights_N)
    if len(weights_N) != 2:
        raise MergeError(
            f"`mean: pair` is for two adapters, and {len(weights_N)} count", "leave it out, or write `mean: chord`"
        )
    shares_N = weights_N / weights_N.sum()
    norms_N = gram_NN.diagonal().clamp(min=0.0).sqrt()
    size = float(norms_N[0] * norms_N[1])
    angle = torch.arccos((gram_NN[0, 1] / size).clamp(-1.0, 1.0)) if size else torch.tensor(torch.pi / 2, dtype=torch.float64)
    sine = torch.sin(angle)
    return shares_N if float(sine) < PARALLEL else torch.sin(shares_N * angle) / sine


def _chord_counts(weights_N: Tensor, gram_NN: Tensor) -> Tensor:
    """sum_i w_i C_i/|C_i|, made as long as sum_i w_i |C_i|; where that direction is none, the plain mean.

    mergekit's multislerp (merge_methods/multislerp.py) goes on from there to the mean in the tangent space of this very point,
    which is the point itself: sum_i w_i (u_i - (u_i . m) m) = 0 for m along sum_i w_i u_i.
    """
    norms_N = gram_NN.diagonal().clamp(min=0.0).sqrt()
    heard = norms_N > 0
    shares_N = torch.where(heard, weights_N / torch.where(heard, norms_N, 1.0), 0.0)
    chord = float((shares_N @ gram_NN @ shares_N).clamp(min=0.0).sqrt())
    if chord <= UNDEFINED:
        return weights_N
    return float(weights_N @ norms_N) / chord * shares_N


def _karcher_counts(weights_N: Tensor, gram_NN: Tensor) -> Tensor:
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
