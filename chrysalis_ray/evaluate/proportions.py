"""Shares of right answers, and how sure they are. Closed forms: no number is drawn.

The bootstrap is not used here: of a few items that all went one way every resample goes the same way, and its interval would be
nothing wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

CONFIDENCE = 0.95


def share(right: Sequence[bool], confidence: float = CONFIDENCE) -> dict[str, float | int]:
    """How many items, the share that is right, and its interval (Wilson 1927)."""
    low, high = wilson(sum(right), len(right), confidence)
    return {"items": len(right), "accuracy": sum(right) / len(right), "low": low, "high": high}


def wilson(count: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The score interval of `count` out of `total`."""
    z = _deviations(confidence)
    found, room = count / total, 1 + z**2 / total
    middle = (found + z**2 / (2 * total)) / room
    reach = z / room * math.sqrt(found * (1 - found) / total + z**2 / (4 * total**2))
    return (middle - reach if count else 0.0), (middle + reach if count < total else 1.0)


def paired_difference(
    ours: Sequence[bool], theirs: Sequence[bool], confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    """Share right of `ours` minus that of `theirs` on the same items, with its interval.

    Newcombe's method 10 (Statistics in Medicine 17, 1998): the score intervals of both shares, put together by how the answers
    hang together, with his correction for continuity.
    """
    pairs = list(zip(ours, theirs, strict=True))
    total = len(pairs)
    both, neither = sum(a and b for a, b in pairs), sum(not a and not b for a, b in pairs)
    only_ours, only_theirs = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    first, second = (both + only_ours) / total, (both + only_theirs) / total
    (low_1, high_1), (low_2, high_2) = (wilson(both + only, total, confidence) for only in (only_ours, only_theirs))
    margins = (both + only_ours) * (only_theirs + neither) * (both + only_theirs) * (only_ours + neither)
    agreeing = float(both * neither - only_ours * only_theirs)
    if agreeing > 0.0:
        agreeing = max(agreeing - total / 2, 0.0)
    phi = agreeing / math.sqrt(margins) if margins else 0.0
    down = _apart(first - low_1, high_2 - second, phi)
    up = _apart(high_1 - first, second - low_2, phi)
    return first - second, max(-1.0, first - second - down), min(1.0, first - second + up)


def _apart(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(one**2 - 2 * phi * one * other + other**2, 0.0))


def _deviations(confidence: float) -> float:
    """Standard deviations to either side that hold a share `confidence` of a normal distribution."""
    return NormalDist().inv_cdf((1 + confidence) / 2)
