"""The merge methods: one line each. A new method is a file, a config class in `config/experiment.py` and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from chrysalis_ray.merge.consensus import agreed_mean, consensus_summary, consensus_weights
from chrysalis_ray.merge.ensemble import ensemble_weights, no_summary, weighted_mean
from chrysalis_ray.merge.winner import winner_weights


class Method(NamedTuple):
    """`weigh` makes weights of held-out losses; `combine` makes one core of N and tallies; `summarise` reads the tallies."""

    weigh: Callable[[Any, Sequence[float]], list[float]]
    combine: Callable[[Any, Tensor, Tensor], tuple[Tensor, Mapping[str, float]]]
    summarise: Callable[[int, Mapping[str, float]], dict[str, float]]


METHODS: dict[str, Method] = {
    "winner": Method(winner_weights, weighted_mean, no_summary),
    "ensemble": Method(ensemble_weights, weighted_mean, no_summary),
    "consensus": Method(consensus_weights, agreed_mean, consensus_summary),
}
