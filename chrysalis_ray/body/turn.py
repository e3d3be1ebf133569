"""What passes between trials, omega and the workers. Plain frozen dataclasses: cheap to send, safe to keep.

Training is a pure function. A *position* names a state of a variant: the sha256 of everything that led there. `advance`
takes a variant from one position to the next by training one chunk; the answer is always the same, so that it can be looked
up instead of computed. Resume after a kill, the restart of a crashed trial, a PBT exploit: all are look-ups of a position.

A *turn* is one piece of work that all workers of a body do together: the chunks of all variants that asked, in one pack. Its
results are committed as one cut of the store, or not at all.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from chrysalis_ray.core.records import Variant, sha256_of
from chrysalis_ray.evaluate.subjects import Candidate, Questions, Replies
from chrysalis_ray.evaluate.subjects import Rows as Scores

__all__ = [
    "Answer", "Ask", "Candidate", "Judged", "Judgement", "Outcome", "Questions", "Replies", "Scores", "Turn", "Work",
    "first_position", "next_ask", "next_position",
]  # fmt: skip

Judged = Scores | dict[str, Replies]  # what comes of a judge turn: scores, or replies to questions


def first_position(variant: Variant) -> str:
    """Where every variant of a population starts: the shared seed on its base."""
    return sha256_of({"seed": variant.seed_sha256, "base": variant.base_sha256, "genome": variant.genome_id})[:32]


def next_position(position: str, variant: Variant) -> str:
    """Where `variant`, as it is now (hyperparameters, epigenome, chunk), gets to from `position` in one chunk."""
    return sha256_of({"from": position, "variant": variant.to_json()})[:32]


@dataclass(frozen=True)
class Work:
    """One chunk of one variant. `seed` is the blob to start from (None: adapter zero), `chunk` counts from 0."""

    variant: Variant
    origin: str
    target: str
    chunk: int
    seed: str | None


@dataclass(frozen=True)
class Ask:
    """A trial process (`who`) waits for `variant` to get from `origin` to `target`."""

    variant: Variant
    origin: str
    target: str
    chunk: int
    who: str = ""

    def starts(self, branched: Variant) -> bool:
        """Whether it is the first chunk of this variant: it starts from the shared seed, which no cut holds."""
        return self.origin == first_position(branched)


@dataclass
class Judgement:
    """A judge turn that somebody waits for."""

    candidates: tuple[Candidate, ...]
    split: str
    rows_per_domain: int
    answer: asyncio.Future[Judged]
    questions: Questions | None = None


@dataclass(frozen=True)
class Turn:
    """Numbered work for a whole body. `kind` is ``train``, ``judge`` or ``dissolve``."""

    number: int
    kind: str
    work: tuple[Work, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    split: str = "select"
    rows_per_domain: int = 0
    questions: Questions | None = None  # what the candidates of a judge turn are asked, instead of held-out text


@dataclass(frozen=True)
class Outcome:
    """What one variant's chunk came to: the blob of its new seed, and its metrics."""

    target: str
    seed: str
    metrics: dict[str, Any] = field(default_factory=dict)


def next_ask(ask: Ask, outcome: Outcome) -> Ask | None:
    """What the trial of an ask that came to `outcome` asks next if nothing is changed; None if the variant ends here."""
    if ask.chunk + 1 >= ask.variant.chunks or outcome.metrics.get("state") == "evicted":
        return None
    return Ask(ask.variant, ask.target, next_position(ask.target, ask.variant), ask.chunk + 1, ask.who)


@dataclass(frozen=True)
class Answer:
    """What a trial gets back: where the variant stands now, and the metrics of getting there."""

    position: str
    chunk: int
    metrics: dict[str, Any]
