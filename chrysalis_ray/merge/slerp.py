"""`slerp`: the weighted mean on the sphere (Shoemake 1985; for more than two the Karcher mean), of one module's deltas."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chrysalis_ray.config.merges import SlerpMerge
from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.merge.core_space import Factors, core_space, cut_to_rank
from chrysalis_ray.merge.elementwise import changes_from
from chrysalis_ray.merge.finished import MergedModule

ROUNDS = 200
SETTLED = 1e-13
UNDEFINED = 1e-7  # a mean direction shorter than that is none: the deltas cancel
OPPOSITE = (
    1e-4  # the same for the Karcher mean, and the sine from which on a delta lies opposite to it, and so on no side of it
)
PARALLEL = 1e-6  # two deltas at an angle whose sine is smaller are mixed evenly, as the formula does in the limit


def spherical_counts(config: SlerpMerge, weights_N: Tensor, gram_NN: Tensor) -> Tensor:
    """What every delta counts in their mean on the sphere. Raises MergeError for a `pair` that is none."""
    if config.mean == "pair":
        return _pair_counts(weights_N, gram_NN)
    return _chord_counts(weights_N, gram_NN) if config.mean == "chord" else _karcher_counts(weights_N, gram_NN)


def turned_rows(
    config: SlerpMerge, weights_N: Tensor, blocks: Sequence[Factors | None], scales: Sequence[float], anchor: Factors | None,
    anchor_scale: float, rank: int | None,
) -> MergedModule:  # fmt: skip
    """The formula for two in every row of the deltas, or in every column, each with the angle of its own; `rank` None: exact.

    mergekit's nuslerp with nuslerp_flatten: false, where nuslerp_row_wise says columns. A row of B_i A_i is that of B_i times
    A_i, so that what a row counts goes into B_i: no dense delta is formed, and nothing is lost at the sum of the ranks. Raises
    MergeError for any other number than two.
    """
    changes, seed = changes_from(blocks, scales, anchor, anchor_scale)
    spoken = [(a, b) if config.along == "rows" else (b.T, a.T) for a, b in (change for change in changes if change is not None)]
    owners = [number for number, change in enumerate(changes) if change is not None]
    size = len(spoken[0][1])
    gram_DNN = torch.zeros(size, len(blocks), len(blocks), dtype=torch.float64)
    for one, (a_RI, b_DR) in zip(owners, spoken, strict=True):
        for other, (a_SI, b_DS) in zip(owners, spoken, strict=True):
            gram_DNN[:, one, other] = ((b_DR @ (a_RI @ a_SI.T)) * b_DS).sum(1)
    counts_DN = _pair_counts(weights_N, gram_DNN)
    parts = [(a, counts_DN[:, n : n + 1] * b) for n, (a, b) in zip(owners, spoken, strict=True)]
    if config.along == "columns":
        parts = [(b.T, a.T) for a, b in parts]
    parts += [seed] if seed is not None else []
    summed = (torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1))
    space = core_space([summed], [1.0], None, 1.0)
    whole_PQ = space.increments_NPQ[0]
    return MergedModule(cut_to_rank(space, whole_PQ, min(whole_PQ.shape) if rank is None else rank), {}, gram_DNN.sum(0))


def _pair_counts(weights_N: Tensor, gram_NN: Tensor) -> Tensor:
    """sin((1-t) a)/sin(a) of the first, sin(t a)/sin(a) of the second, a the angle between them and t what the second weighs;
    [.., 2] for Gram matrices [.., 2, 2].

    mergekit's nuslerp around a base (merge_methods/nuslerp.py). Parallel and opposite deltas are mixed evenly.
    """
    if len(weights_N) == 1:
        return torch.ones_like(weights_N)
    if len(weights_N) != 2:
        raise MergeError(
            f"`mean: pair` is for two adapters, and {len(weights_N)} count", "leave it out, or write `mean: chord`"
        )
    shares_N = weights_N / weights_N.sum()
    norms_N = gram_NN.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()
    size = norms_N.prod(-1)
    cosine = torch.where(size > 0.0, gram_NN[..., 0, 1] / torch.where(size > 0.0, size, 1.0), 0.0)
    angle = torch.arccos(cosine.clamp(-1.0, 1.0))[..., None]
    sine = torch.sin(angle)
    turned_N = torch.sin(shares_N * angle) / torch.where(sine < PARALLEL, 1.0, sine)
    return torch.where(sine < PARALLEL, shares_N, turned_N)


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
    mean_N = _mean_direction(shares_N.numpy(), directions_NN.numpy())
    if mean_N is not None:
        counts_N[heard] = (weights_N @ norms_N) * torch.from_numpy(mean_N) / norms_N[heard]
    return counts_N


def _mean_direction(shares_N: NDArray[np.float64], cosines_NN: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The mean m of unit vectors, in their coefficients; None where they cancel. In numpy, to which a few numbers cost less.

    A vector opposite to m has no shortest way there, and does not pull: within rounding it would pull anywhere. Coefficients of
    what is nearly opposite are as large as their sine is small, and a Gram matrix has digits for `OPPOSITE`, not for less.
    """
    mean_N = shares_N
    size = float(mean_N @ cosines_NN @ mean_N) if len(mean_N) else 0.0
    if size <= OPPOSITE**2:
        return None
    mean_N = mean_N / size**0.5
    for _ in range(ROUNDS):
        cosine_N = np.minimum(np.maximum(cosines_NN @ mean_N, -1.0), 1.0)
        angle_N = np.arccos(cosine_N)
        sine_N = np.sin(angle_N)
        stretch_N = shares_N * np.divide(angle_N, sine_N, out=np.ones_like(angle_N), where=sine_N > 0.0)  # 1 at 0
        stretch_N[(cosine_N < 0.0) & (sine_N < OPPOSITE)] = 0.0
        step_N = stretch_N - (stretch_N @ cosine_N) * mean_N  # sum_i w_i log_m(u_i), in coefficients
        length = math.sqrt(max(float(step_N @ cosines_NN @ step_N), 0.0))
        if length < SETTLED:
            break
        mean_N = math.cos(length) * mean_N + math.sin(length) / length * step_N
        mean_N = mean_N / math.sqrt(float(mean_N @ cosines_NN @ mean_N))
    return mean_N
