"""Answers to probes in a run: what may choose, and what tells. Two types on purpose, as for losses.

Where nothing chooses by probes, all items tell. With `evaluate.max_probe_drop` the items of every probe are dealt out by their
hashes: one half guards the choice, the other half tells. No item is in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from chrysalis_ray.config.questions import Probe
from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.core.records import read_json, sha256_of

Right = Mapping[str, Sequence[bool]]  # candidate -> which of the items it got right


@dataclass(frozen=True)
class Answers:
    """probe -> candidate -> which items it got right; of every probe all candidates have the same items in the same order."""

    split: ClassVar[str]

    right: Mapping[str, Right]

    @property
    def probes(self) -> tuple[str, ...]:
        return tuple(self.right)

    def of(self, probe: str, candidate: str) -> Sequence[bool]:
        """Raises EvaluationError for a candidate that was not asked."""
        if candidate not in self.right[probe]:
            raise EvaluationError(f"{candidate} was not asked {probe}")
        return self.right[probe][candidate]

    def accuracy(self, probe: str, candidate: str) -> float:
        own = self.of(probe, candidate)
        return sum(own) / len(own)

    @classmethod
    def load(cls, path: Path) -> Self:
        """From `evaluation/probes.json`. Raises EvaluationError for a file that holds no such answers."""
        try:
            written = read_json(path)[cls.split]
            right = {
                probe: {name: tuple(bool(mark) for mark in marks) for name, marks in told["right"].items()}
                for probe, told in written.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvaluationError(f"{path} holds no answers that {cls.verb}: {error}", "delete it; it is made again") from error
        return cls(right)

    verb: ClassVar[str]


@dataclass(frozen=True)
class SelectAnswers(Answers):
    """Answers that guard the choice."""

    split: ClassVar[str] = "select"
    verb: ClassVar[str] = "choose"


@dataclass(frozen=True)
class ReportAnswers(Answers):
    """Answers that tell, and never choose."""

    split: ClassVar[str] = "report"
    verb: ClassVar[str] = "tell"


def dealt(probe: Probe, guarded: bool) -> dict[str, list[int]]:
    """split -> the items of a probe that belong to it, in order; all tell where nothing is `guarded` by probes."""
    places = range(len(probe.items))
    if not guarded:
        return {"select": [], "report": list(places)}
    by_hash = sorted(places, key=lambda place: sha256_of(probe.items[place].model_dump(mode="json")))
    half = len(by_hash) // 2
    return {"select": sorted(by_hash[:half]), "report": sorted(by_hash[half:])}


def drops(answers: SelectAnswers, merges: Sequence[str], winner: str, most: float) -> dict[str, str]:
    """Why merges must not be released, by name: the probe on which each lost most against `winner`, if that is beyond `most`.

    Raises TypeError for answers that tell.
    """
    if not isinstance(answers, SelectAnswers):
        raise TypeError(f"only SelectAnswers guard a choice, these are {type(answers).__name__}")
    reasons = {}
    for name in merges:
        lost = {probe: answers.accuracy(probe, winner) - answers.accuracy(probe, name) for probe in answers.probes}
        worst = max(lost, key=lambda probe: lost[probe])
        if lost[worst] > most:
            reasons[name] = (
                f"on {worst} it answers {answers.accuracy(worst, name):.1%} right, {winner} "
                f"{answers.accuracy(worst, winner):.1%}: a drop of more than the {most:g} that evaluate.max_probe_drop allows"
            )
    return reasons
