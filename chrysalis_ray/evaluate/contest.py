"""Which of several blueprints is better: the choice of a probe, a pure function of scores on *select*.

Every candidate is compared with the one that stands without a probe, on the documents that both were judged on, with the paired
bootstrap of `bootstrap.py`. Another is chosen only where its interval lies below zero, at a confidence corrected for the number
of comparisons (Bonferroni). Nothing of *report* is seen here.

Where all were judged on the same tokens, their losses are compared in nats per token. Rows of another length see more or less
of a document, and with more before it: there candidates of one base are compared by what they have less than the bare base on
what they themselves saw. Candidates of several bases are compared in bits per byte, on documents of which all saw as much. The
intervals are over documents: how another order of rows or another random seed would have come out is not in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.evaluate.bootstrap import Floats, draws_for, interval, resampled_losses
from chrysalis_ray.evaluate.scores import DocumentScore, SelectScores

NATS, GAIN, BITS = "nats per token", "nats per token against the bare base", "bits per byte"
BARE = ""  # the bare base, among those judged together
ALIKE = 1.05  # how many times as many bytes of a document one candidate may have seen as another
FEWEST_DOCUMENTS = 8  # that candidates must share: the bootstrap of fewer says too little
_Name = tuple[str, str]  # domain, document


@dataclass(frozen=True)
class Judged:
    """Candidates that were judged together, and `BARE` with them. `base` is the same for scores on the same base."""

    base: str
    scores: SelectScores


@dataclass(frozen=True)
class Standing:
    """How a candidate did: its loss, and its loss minus that of the first with the interval. What is None was not judged, or
    was not compared; `why` says what became of it."""

    candidate: str
    loss: float | None
    difference: float | None
    low: float | None
    high: float | None
    why: str


@dataclass(frozen=True)
class Contest:
    """Who was chosen and why: `sentence` says it. `tied` where the first stays because nobody is better beyond doubt."""

    winner: str
    tied: bool
    sentence: str
    unit: str
    confidence: float  # of every interval
    documents: int  # that all were judged on
    standings: tuple[Standing, ...]

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "standings": [standing.__dict__ for standing in self.standings]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Contest:
        """Raises KeyError or TypeError for what `to_json` cannot have written."""
        return cls(**{**value, "standings": tuple(Standing(**standing) for standing in value["standings"])})

    def lines(self) -> list[str]:
        """A table for people: a line for each candidate, then who was chosen."""
        width = max(len(standing.candidate) for standing in self.standings)
        return [*(self._line(standing, width) for standing in self.standings), self.sentence]

    def _line(self, standing: Standing, width: int) -> str:
        loss = "not judged" if standing.loss is None else f"{standing.loss:.4f} {self.unit}"
        apart = ""
        if standing.difference is not None:
            apart = f", {standing.difference:+.4f} ({standing.low:+.4f} to {standing.high:+.4f})"
        return f"{standing.candidate:<{width}}  {loss}{apart}: {standing.why}"


def decide(
    judged: Sequence[Judged],
    first: str,
    failed: Mapping[str, str],
    *,
    bootstrap_samples: int = 2000,
    confidence: float = 0.95,
    rng_seed: int = 0,
) -> Contest:
    """Choose between the candidates of `judged`, of which `first` stays unless another is better; `failed` holds those that
    were not judged, with the reason.

    Documents bear the same names in all of `judged`. Raises TypeError for scores of another split, EvaluationError where nobody
    is left.
    """
    for each in judged:
        if not isinstance(each.scores, SelectScores):
            raise TypeError(f"only SelectScores choose, these are {type(each.scores).__name__}")
    rows = {name: each for each in judged for name in each.scores.candidates if name != BARE}
    if not rows:
        raise EvaluationError(
            f"none of {len(failed)} blueprints could be tried: {'; '.join(f'{name}: {why}' for name, why in failed.items())}",
            "look into probe/, or leave the probe out",
        )
    names = [first, *(name for name in rows if name != first)] if first in rows else list(rows)
    corrected = 1.0 - (1.0 - confidence) / max(len(names) - 1, 1)
    table = _table(rows, names)
    if table is None:
        return _unknown(names, failed, corrected)
    losses_CD, sizes_D, domains_D, unit = table
    told = _macro(losses_CD, sizes_D, domains_D)
    drawn_SC = resampled_losses(losses_CD, sizes_D, domains_D, draws_for(corrected, bootstrap_samples), rng_seed)
    apart = [told[place] - told[0] for place in range(len(names))]
    spans = [interval(drawn_SC[:, place] - drawn_SC[:, 0], corrected) for place in range(len(names))]
    enough = len(sizes_D) >= FEWEST_DOCUMENTS
    better = [place for place in range(1, len(names)) if enough and spans[place][1] < 0.0]
    best = int(np.argmin(told))
    if first not in rows:  # the one that would stay cannot: the lowest loss decides
        chosen, tied = best, False
    else:
        chosen, tied = min(better, key=lambda place: told[place], default=0), not better and best != 0
    standings = [_first(names[0], told[0], first)] + [
        Standing(names[place], told[place], apart[place], *spans[place], _how(apart[place], *spans[place], enough))
        for place in range(1, len(names))
    ]
    standings += [Standing(name, None, None, None, None, why) for name, why in failed.items()]
    sentence = _sentence(names, chosen, first, apart, spans, failed, len(sizes_D), enough)
    return Contest(names[chosen], tied, sentence, unit, corrected, len(sizes_D), tuple(standings))


# documents that all were judged on ------------------------------------------------------------------------------------


def _table(rows: Mapping[str, Judged], names: Sequence[str]) -> tuple[Floats, Floats, NDArray[np.int64], str] | None:
    """(losses [C, D], sizes [D], domains [D], unit) of the documents that all candidates share; None where there are none, or
    where they cannot be compared. A document weighs as much as the least that any candidate saw of it."""
    by_name = [_by_document(rows[name].scores.of(name)) for name in names]
    shared = sorted(set.intersection(*(set(own) for own in by_name)))
    if not shared:
        return None
    losses_CD = np.array([[own[document].loss_sum for document in shared] for own in by_name])
    sizes_CD = np.array([[own[document].tokens for document in shared] for own in by_name], dtype=np.float64)
    unit = NATS
    if (sizes_CD != sizes_CD[0]).any() and len({rows[name].base for name in names}) == 1:
        bare = [_by_document(rows[name].scores.of(BARE)) for name in names]
        losses_CD -= np.array([[own[document].loss_sum for document in shared] for own in bare])
        unit = GAIN
    elif (sizes_CD != sizes_CD[0]).any():
        sizes_CD = np.array([[own[document].bytes or 0 for document in shared] for own in by_name], dtype=np.float64)
        alike_D = (sizes_CD.min(0) > 0) & (sizes_CD.max(0) <= ALIKE * sizes_CD.min(0))
        losses_CD, sizes_CD = losses_CD[:, alike_D] / math.log(2), sizes_CD[:, alike_D]
        shared = [document for document, alike in zip(shared, alike_D, strict=True) if alike]
        unit = BITS
    if not shared:
        return None
    sizes_D = sizes_CD.min(0)
    places = {domain: place for place, domain in enumerate(sorted({domain for domain, _ in shared}))}
    domains_D = np.array([places[domain] for domain, _ in shared], dtype=np.int64)
    return losses_CD / sizes_CD * sizes_D, sizes_D, domains_D, unit


def _by_document(scores: Sequence[DocumentScore]) -> dict[_Name, DocumentScore]:
    return {score.name: score for score in scores}


def _macro(losses_CD: Floats, sizes_D: Floats, domains_D: NDArray[np.int64]) -> list[float]:
    """The loss of every candidate: weighted by size in a domain, then the plain mean over domains."""
    inside_ND = domains_D == np.unique(domains_D)[:, None]
    return [float(np.mean([losses_D[inside].sum() / sizes_D[inside].sum() for inside in inside_ND])) for losses_D in losses_CD]


# words --------------------------------------------------------------------------------------------------------------


def _first(name: str, loss: float, first: str) -> Standing:
    why = "what the others are compared with"
    return Standing(name, loss, None, None, None, why if name == first else f"{why}, since {first} was not judged")


def _how(difference: float, low: float, high: float, enough: bool) -> str:
    if not enough:
        return "too few documents to say"
    if high < 0.0:
        return "better"
    return "worse" if low > 0.0 else "no difference that can be told from chance"


def _sentence(
    names: Sequence[str],
    chosen: int,
    first: str,
    apart: Sequence[float],
    spans: Sequence[tuple[float, float]],
    failed: Mapping[str, str],
    documents: int,
    enough: bool,
) -> str:
    if names[0] != first:
        why = failed.get(first, "no score")
        return f"{names[chosen]}: {first} was not judged ({why}), and of the others it has the least loss"
    if chosen:
        low, high = spans[chosen]
        return (
            f"{names[chosen]}: better than {first} by {-apart[chosen]:.4f} ({-high:.4f} to {-low:.4f}) on {documents} documents"
        )
    if len(names) == 1:
        return f"{first}: no other could be tried"
    best = min(range(1, len(names)), key=lambda place: apart[place])
    if apart[best] >= 0.0:
        return f"{first}: none of {len(names) - 1} others has less loss"
    low, high = spans[best]
    if not enough:
        return f"{first} stays: {documents} shared documents are too few to prefer {names[best]}; raise probe.rows_per_domain"
    told = f"{names[best]} has {-apart[best]:.4f} less, and the interval ({low:+.4f} to {high:+.4f}) includes zero"
    return f"{first} stays, as the tie goes to it: {told}"


def _unknown(names: Sequence[str], failed: Mapping[str, str], confidence: float) -> Contest:
    """Nobody can be compared: the one that stands without a probe stays, or the first of those that were judged."""
    why = "no document of which all saw as much, or its bytes are not known"
    standings = [Standing(name, None, None, None, None, why) for name in names]
    standings += [Standing(name, None, None, None, None, reason) for name, reason in failed.items()]
    sentence = f"{names[0]} stays: there is {why}; raise probe.rows_per_domain"
    return Contest(names[0], True, sentence, NATS, confidence, 0, tuple(standings))
