"""Held-out scores of candidates, document by document. What chooses and what tells are two types on purpose.

A loss is in nats, summed over the tokens of a document. The loss of a candidate is macro: token-weighted inside a domain, then
the plain mean over domains, so that neither a large domain nor a variant's own mix decides what counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.core.records import read_json, write_json

Floats = NDArray[np.float64]
LARGEST_LOSS = 700.0  # nats: e to the power of more is beyond a float


@dataclass(frozen=True)
class DocumentScore:
    """Loss of one document, in nats summed over its `tokens`. Where they are known, `bytes` of the text that those tokens stand
    for allow bits per byte, and `correct`, how many of them were the likeliest, tells accuracy."""

    domain: str
    document: int | str
    loss_sum: float
    tokens: int
    bytes: int | None = None
    correct: int | None = None

    @property
    def name(self) -> tuple[str, str]:
        return self.domain, str(self.document)


@dataclass(frozen=True)
class Scores:
    """Candidates judged on the same documents. Use `SelectScores` or `ReportScores`, not this.

    Raises EvaluationError where there is nothing to judge, a loss is not a number, or candidates saw different documents.
    """

    candidates: Mapping[str, Sequence[DocumentScore]]
    split: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not self.candidates or not all(self.candidates.values()):
            raise EvaluationError(f"no scores on {self.split}", "give `evaluate.rows_per_domain` a larger number")
        ordered = {
            name: tuple(sorted(scores, key=lambda score: (score.domain, str(score.document).zfill(20))))
            for name, scores in self.candidates.items()
        }
        first_name, first = next(iter(ordered.items()))
        if len({score.name for score in first}) != len(first):
            raise EvaluationError(f"{first_name} was scored twice on one document of {self.split}")
        seen = [(score.name, score.tokens) for score in first]
        for name, scores in ordered.items():
            for score in scores:
                if not math.isfinite(score.loss_sum):
                    raise EvaluationError(
                        f"the loss of {name} on {score.domain} ({self.split}) is {score.loss_sum}",
                        "leave it out of the judging: it diverged",
                    )
                if score.tokens < 1:
                    raise EvaluationError(f"document {score.document} of {score.domain} ({self.split}) has no tokens to score")
            if [(score.name, score.tokens) for score in scores] != seen or _other_bytes(scores, first):
                raise EvaluationError(f"{name} and {first_name} were scored on different documents of {self.split}")
        object.__setattr__(self, "candidates", ordered)

    @property
    def documents(self) -> Sequence[DocumentScore]:
        """The documents all candidates share (with the losses of the first)."""
        return next(iter(self.candidates.values()))

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(sorted({score.domain for score in self.documents}))

    def of(self, candidate: str) -> Sequence[DocumentScore]:
        """The scores of one candidate. Raises EvaluationError for a name that was not scored."""
        if candidate not in self.candidates:
            raise EvaluationError(f"{candidate!r} was not scored on {self.split}", f"scored are {', '.join(self.candidates)}")
        return self.candidates[candidate]

    def loss(self, candidate: str) -> float:
        """Macro loss in nats per token."""
        return float(np.mean(list(self.loss_by_domain(candidate).values())))

    def loss_by_domain(self, candidate: str) -> dict[str, float]:
        """Nats per token in each domain: one row of the variant x domain matrix."""
        losses, counts = dict.fromkeys(self.domains, 0.0), dict.fromkeys(self.domains, 0)
        for score in self.of(candidate):
            losses[score.domain] += score.loss_sum
            counts[score.domain] += score.tokens
        return {domain: losses[domain] / counts[domain] for domain in self.domains}

    def bits_per_byte(self, candidate: str) -> float | None:
        """Macro bits per byte, comparable between tokenizers; None where the bytes are not known."""
        return mean_of_known([metrics["bits_per_byte"] for metrics in self.metrics(candidate).values()])

    def accuracy(self, candidate: str) -> float | None:
        """Macro share of tokens that were found likeliest, of equals the first; None where that was not counted."""
        return mean_of_known([metrics["accuracy"] for metrics in self.metrics(candidate).values()])

    def metrics(self, candidate: str) -> dict[str, dict[str, float | None]]:
        """By domain: loss in nats per token, perplexity, bits per byte, token accuracy; None for what is not known."""
        told: dict[str, dict[str, float | None]] = {}
        for domain in self.domains:
            own = [score for score in self.of(candidate) if score.domain == domain]
            total, tokens = math.fsum(score.loss_sum for score in own), sum(score.tokens for score in own)
            sizes = [score.bytes for score in own if score.bytes is not None]
            hits: list[int] = [score.correct for score in own if score.correct is not None]
            told[domain] = {
                "loss": total / tokens,
                "perplexity": math.exp(min(total / tokens, LARGEST_LOSS)),
                "bits_per_byte": total / sum(sizes) / math.log(2) if len(sizes) == len(own) and sum(sizes) > 0 else None,
                "accuracy": sum(hits) / tokens if len(hits) == len(own) else None,
            }
        return told

    def losses(self) -> dict[str, float]:
        """Macro loss of every candidate, in nats per token."""
        return {candidate: self.loss(candidate) for candidate in self.candidates}

    def to_json(self) -> dict[str, Any]:
        return {
            "split": self.split,
            "candidates": {name: [_row(score) for score in scores] for name, scores in self.candidates.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """From ``{"split", "candidates": {name: [[domain, document, loss_sum, tokens], ...]}}``; a fifth and a sixth number,
        where there are any, are bytes and hits, null where they are not known.

        Raises EvaluationError for scores of the other split: what chooses never tells.
        """
        if value.get("split") != cls.split:
            raise EvaluationError(f"these are scores on {value.get('split')!r}, not on {cls.split!r}")
        return cls({name: tuple(DocumentScore(*row) for row in rows) for name, rows in value["candidates"].items()})

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises EvaluationError for a file that holds no such scores."""
        try:
            return cls.from_json(read_json(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvaluationError(f"{path} holds no scores on {cls.split}: {error}", "delete it; it is made again") from error


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """The mean, None unless all values are known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _other_bytes(scores: Sequence[DocumentScore], others: Sequence[DocumentScore]) -> bool:
    """Whether two candidates disagree in the bytes of a document. One that was scored before bytes were counted does not."""
    pairs = ((one.bytes, other.bytes) for one, other in zip(scores, others, strict=True))
    return any(one != other for one, other in pairs if one is not None and other is not None)


def _row(score: DocumentScore) -> list[Any]:
    row = [score.domain, score.document, score.loss_sum, score.tokens]
    known = [score.bytes, score.correct]
    return [*row, *known] if score.correct is not None else [*row, *known[:1]] if score.bytes is not None else row


@dataclass(frozen=True)
class SelectScores(Scores):
    """Scores on the *select* split: these choose."""

    split: ClassVar[str] = "select"


@dataclass(frozen=True)
class ReportScores(Scores):
    """Scores on the *report* split: these tell, and never choose."""

    split: ClassVar[str] = "report"


def read_select(path: Path) -> SelectScores:
    """The select scores of a file. Raises EvaluationError where it holds none."""
    return SelectScores.load(path)


def read_report(path: Path) -> ReportScores:
    """The report scores of a file. Raises EvaluationError where it holds none."""
    return ReportScores.load(path)
