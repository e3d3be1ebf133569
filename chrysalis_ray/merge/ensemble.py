"""`ensemble`: the weighted mean of the deltas (model soups, arXiv 2203.05482), exact, not of A and B apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from chrysalis_ray.config.experiment import EnsembleMerge, WinnerMerge
from chrysalis_ray.core.errors import MergeError


def refuse_unscored(scores: Sequence[float]) -> None:
    """Raises MergeError for a held-out loss that is not a number."""
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise MergeError(f"adapter {index} has the held-out loss {score}", "leave out the variant that diverged")


def ensemble_weights(config: EnsembleMerge, scores: Sequence[float]) -> list[float]:
    """`uniform`: 1/N each. `softmax`: proportional to exp(-(loss - best loss) / temperature), losses in nats per token."""
    if config.weights == "uniform":
        return [1.0 / len(scores)] * len(scores)
    refuse_unscored(scores)
    best = min(scores)
    raw = [math.exp(-(score - best) / config.temperature) for score in scores]
    return [value / math.fsum(raw) for value in raw]


def weighted_mean(
    config: EnsembleMerge | WinnerMerge, weights_N: Tensor, increments_NPQ: Tensor
) -> tuple[Tensor, Mapping[str, float]]:
    """sum_i w_i C_i, weights summing to one. The anchor adds back what it took, so that it does not matter here."""
    return torch.einsum("n,npq->pq", weights_N, increments_NPQ), {}


def no_summary(members: int, tallies: Mapping[str, float]) -> dict[str, float]:
    """A mean has nothing to tell beyond its weights and its residual."""
    return {}
