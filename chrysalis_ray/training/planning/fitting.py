"""From timed steps to the numbers of `pace.py`: least squares of relative errors, no number negative.

Both forms of the law are fitted and the one with the smaller residual is taken: a launch and work that add up (a CPU that
dispatches, then computes), or the larger of the two (a GPU that computes while the next operations are launched).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from chrysalis_ray.training.planning.measured import Point
from chrysalis_ray.training.planning.pace import Pace


@dataclass(frozen=True)
class Scored:
    """Seconds in which `tokens` held-out tokens were scored for each of `variants`."""

    variants: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Fit:
    """The better form, the root mean square of its relative errors, and that of the other form."""

    pace: Pace
    residual: float
    rejected: float


def fit(
    points: Sequence[Point],
    workers: int,
    shards: int,
    per_variant: float,
    scored: Scored,
    keep: float,
    tokens_per_pass: int | None = None,
) -> Fit:
    """Launch cost, time per token and per token and length, and crowding, from `points`.

    `per_variant` (an optimizer's step of one row), `scored` and `keep` were timed by themselves, the points with passes of
    `tokens_per_pass`. Raises ValueError where there is no point with one variant.
    """
    bare = Pace(
        kind="sum",
        launch=0.0,
        per_token=0.0,
        per_variant=per_variant,
        keep=keep,
        shards=shards,
        crowding=_crowding(points, shards),
        tokens_per_pass=tokens_per_pass,
    )
    per_score = scored.seconds / (bare.part(scored.variants) * scored.tokens * bare.crowd(scored.variants))
    bare = replace(bare, score_per_token=per_score)
    rows, seconds = [], []
    for point in points:
        part = bare.part(point.variants)
        tokens = point.microsteps * part * point.rows * point.length / workers
        passes = bare.passes(point.variants, point.rows * point.length / workers, point.length)
        rows.append((point.microsteps * passes, tokens, tokens * point.length))
        seconds.append(max(point.seconds / bare.crowd(point.variants) - per_variant * part, 1e-9))
    features, wanted = np.array(rows, dtype=np.float64), np.array(seconds)
    forms = (
        _with(replace(bare, kind="sum"), _sum(features, wanted)),
        _with(replace(bare, kind="roofline"), _roof(features, wanted)),
    )
    better, other = sorted(forms, key=lambda pace: _residual(pace, points, workers))
    return Fit(better, _residual(better, points, workers), _residual(other, points, workers))


def _with(pace: Pace, law: Sequence[float]) -> Pace:
    launch, per_token, per_token_length = law
    return replace(pace, launch=launch, per_token=per_token, per_token_length=per_token_length)


def _crowding(points: Sequence[Point], shards: int) -> float:
    """How many times as long a step takes with a variant on every shard as with one on one."""
    alone = [point for point in points if point.variants == 1]
    if not alone:
        raise ValueError("no step of one variant was timed")
    for full in points:
        for one in alone:
            if full.variants == shards > 1 and (full.rows, full.length, full.microsteps) == (
                one.rows,
                one.length,
                one.microsteps,
            ):
                return max(full.seconds / one.seconds, 1.0)
    return 1.0


def _residual(pace: Pace, points: Sequence[Point], workers: int) -> float:
    errors = [
        pace.step(point.variants, point.rows * point.length / workers, point.length, point.microsteps) / point.seconds - 1.0
        for point in points
    ]
    return math.sqrt(sum(error * error for error in errors) / len(errors))


def _sum(features: NDArray[np.float64], seconds: NDArray[np.float64]) -> list[float]:
    """launch + work."""
    return _least_squares(features, seconds)


def _roof(features: NDArray[np.float64], seconds: NDArray[np.float64]) -> list[float]:
    """max(launch, work): the points with the fewest tokens give the launch, the others the work; every border is tried."""
    order = np.argsort(features[:, 1] / features[:, 0])
    best: tuple[float, list[float]] | None = None
    for border in range(len(order)):
        flat, steep = order[:border], order[border:]
        launch = float(np.mean(seconds[flat] / features[flat, 0])) if border else 0.0
        per_token, per_token_length = _least_squares(features[steep, 1:], seconds[steep])
        work = features[:, 1] * per_token + features[:, 2] * per_token_length
        told = np.maximum(features[:, 0] * launch, work)
        error = float(np.sum((told / seconds - 1.0) ** 2))
        if best is None or error < best[0]:
            best = error, [launch, per_token, per_token_length]
    assert best is not None
    return best[1]


def _least_squares(features: NDArray[np.float64], seconds: NDArray[np.float64]) -> list[float]:
    """Coefficients >= 0 that make the squared relative errors least. Few columns: every choice of zeros is tried."""
    scaled = features / seconds[:, None]
    columns = features.shape[1]
    best, least = [0.0] * columns, math.inf
    for count in range(1, columns + 1):
        for chosen in itertools.combinations(range(columns), count):
            part, *_ = np.linalg.lstsq(scaled[:, chosen], np.ones(len(seconds)), rcond=None)
            error = float(np.sum((scaled[:, chosen] @ part - 1.0) ** 2))
            if (part >= 0.0).all() and error < least - 1e-12:
                best, least = [0.0] * columns, error
                for column, value in zip(chosen, part, strict=True):
                    best[column] = float(value)
    return best
