"""How much each member counts, for every method alike: positive weights that sum to one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from chrysalis_ray.config.merges import JUDGED, Merge, WinnerMerge
from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.merge.geometric_median import geometric_median, robust_weights
from chrysalis_ray.merge.winner import winner_weights


def weigh(
    config: Merge, members: int, scores: Sequence[float] | None, gram: Callable[[], Tensor]
) -> tuple[list[float], dict[int, str]]:
    """The weights that `config` asks for, and why members are held out. `gram` makes the Gram matrix of the changes.

    `uniform`: 1/N each. `softmax`: proportional to exp(-(loss - best loss) / temperature), losses in nats per token.
    `geometric_median`, `robust`: see `geometric_median.py`. `greedy`, `greedy_layers`, `searched`: see
    `evaluate/greedy.py` and `searched.py`. Raises MergeError where losses are needed and missing, or no numbers.
    """
    if isinstance(config, WinnerMerge):
        return winner_weights(needed(scores, "`winner` is the one with the lowest held-out loss")), {}
    if config.weights == "softmax":
        return softmax_weights(needed(scores, "`weights: softmax` follows held-out losses"), config.temperature), {}
    if config.weights == "geometric_median":
        return geometric_median(gram()).tolist(), {}
    if config.weights == "robust":
        weights_N, reasons = robust_weights(gram(), None if scores is None else needed(scores, ""))
        return weights_N.tolist(), reasons
    if config.weights in JUDGED:  # within a run they are found, and `uniform` by the time they come here
        raise MergeError(
            f"`weights: {config.weights}` judges the merge of every trial",
            "give other weights, or merge within `chrysalis run`",
        )
    return [1.0 / members] * members, {}


def softmax_weights(scores: Sequence[float], temperature: float) -> list[float]:
    """exp(-(loss - best loss) / temperature), divided by their sum."""
    best = min(scores)
    raw = [math.exp(-(score - best) / temperature) for score in scores]
    return [value / math.fsum(raw) for value in raw]


def given_weights(given: Sequence[float], members: int) -> list[float]:
    """Weights that a person wrote, divided by their sum. Raises MergeError for what is no set of weights."""
    if len(given) != members:
        raise MergeError(f"{len(given)} weights for {members} adapters", "give one weight for each adapter")
    wrong = [weight for weight in given if not math.isfinite(weight) or weight < 0.0]
    if wrong or not math.fsum(given) > 0.0:
        raise MergeError(f"the weights {', '.join(f'{weight:g}' for weight in given)} are no shares of a whole",
                         "give numbers from 0 on, not all 0")  # fmt: skip
    return [weight / math.fsum(given) for weight in given]


def needed(scores: Sequence[float] | None, why: str) -> Sequence[float]:
    """The held-out losses. Raises MergeError if there are none, or one that is not a number."""
    if scores is None:
        raise MergeError(f"{why}, and nothing has judged these adapters", "give --weights, or merge within `chrysalis run`")
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise MergeError(f"adapter {index} has the held-out loss {score}", "leave out the variant that diverged")
    return scores
