"""`winner`: the best variant as it is. What every verdict falls back to."""

from __future__ import annotations

from collections.abc import Sequence


def winner_weights(scores: Sequence[float]) -> list[float]:
    """One for the lowest held-out loss, zero for the others; among equals the first."""
    best = min(range(len(scores)), key=lambda index: scores[index])
    return [float(index == best) for index in range(len(scores))]
