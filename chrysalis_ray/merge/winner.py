"""`winner`: the best variant as it is. What every verdict falls back to."""

from __future__ import annotations

from collections.abc import Sequence

from chrysalis_ray.config.experiment import WinnerMerge
from chrysalis_ray.merge.ensemble import refuse_unscored


def winner_weights(config: WinnerMerge, scores: Sequence[float]) -> list[float]:
    """One for the lowest held-out loss, zero for the others; among equals the first."""
    refuse_unscored(scores)
    best = min(range(len(scores)), key=lambda index: scores[index])
    return [float(index == best) for index in range(len(scores))]
