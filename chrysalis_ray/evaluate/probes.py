"""Probe tasks by likelihood: of every candidate, how often the right answer is the likeliest, or what it would write.

Each prompt with each answer is a row; only the answer's tokens carry labels. Losses give the choice, as the sum of the answer's
log-likelihoods and the same per byte of the answer (a long answer is less likely than a short one); hits say whether greedy
decoding would write the answer token for token, which is exact match. Nothing is generated, and all candidates share a pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chrysalis_ray.config.probes import ChoiceProbe, Probe
from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.evaluate.heldout import Scorer
from chrysalis_ray.evaluate.judging import Find, passes
from chrysalis_ray.evaluate.subjects import Candidate
from chrysalis_ray.genome.tokens import NO_LABEL, RowBatch
from chrysalis_ray.training.pack import Pack

Encode = Callable[[list[str]], list[list[int]]]
SURELY = 1.959964  # standard deviations of a 95 % interval


@dataclass(frozen=True)
class Answered:
    """A prompt with one answer, in tokens: those from `start` on are the answer's."""

    ids: tuple[int, ...]
    start: int
    size: int  # bytes of the answer


@dataclass(frozen=True)
class Heard:
    """What a candidate makes of an answer: its loss in nats, and whether greedy decoding would write it."""

    loss: float
    written: bool


def judge_probes(
    pack: Pack, encode: Encode, longest: int | None, probes: Sequence[Probe], candidates: Sequence[Candidate], find: Find
) -> dict[str, dict[str, dict[str, Any]]]:
    """probe -> candidate -> items, accuracy with its interval and, where there are choices, accuracy per byte.

    `encode` makes ids of texts; rows may be as long as `longest`. Raises EvaluationError for an item that is longer.
    """
    rows = [answered_rows(encode, probe, longest) for probe in probes]
    flat = [row for own in rows for row in own]
    heard: dict[str, list[Heard]] = {}
    for group, score, batch_rows in passes(pack, candidates, find):
        heard |= dict(zip((each.name for each in group), _hear(score, flat, batch_rows), strict=True))
    told: dict[str, dict[str, dict[str, Any]]] = {}
    for number, (probe, own) in enumerate(zip(probes, rows, strict=True)):
        start = sum(map(len, rows[:number]))
        told[probe.name] = {each.name: result(probe, own, heard[each.name][start : start + len(own)]) for each in candidates}
    return told


def answered_rows(encode: Encode, probe: Probe, longest: int | None) -> list[Answered]:
    """Every prompt of a probe with every answer, in order."""
    if isinstance(probe, ChoiceProbe):
        texts = [(item.prompt, choice) for item in probe.items for choice in item.choices]
    else:
        texts = [(item.prompt, item.answer) for item in probe.items]
    prompts, wholes = encode([prompt for prompt, _ in texts]), encode([prompt + answer for prompt, answer in texts])
    rows = []
    for (prompt, answer), before, whole in zip(texts, prompts, wholes, strict=True):
        # where a token spans the seam, the answer begins with it; the first token of all has nothing before it
        same = next((place for place, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1]), len(before))
        start = max(1, min(same, len(whole) - 1))
        if len(whole) < 2 or (longest is not None and len(whole) > longest):
            raise EvaluationError(
                f"{probe.name}: {prompt[:40]!r} with {answer[:40]!r} has {len(whole)} tokens; the base takes 2 to {longest}",
                "make the prompt shorter, or longer",
            )
        rows.append(Answered(tuple(whole), start, len(answer.encode())))
    return rows


def _hear(score: Scorer, rows: Sequence[Answered], batch_rows: int) -> list[list[Heard]]:
    """What every candidate of a pass makes of every row; rows of like length share a batch."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place].ids))
    found: list[list[Heard | None]] = []
    for first in range(0, len(order), batch_rows):
        places = order[first : first + batch_rows]
        scores = score(_batch([rows[place] for place in places]))
        losses_CN, hits_CN = scores.losses.double().sum(-1).tolist(), scores.hits.sum(-1).tolist()
        found = found or [[None] * len(rows) for _ in losses_CN]
        for candidate, (losses, hits) in enumerate(zip(losses_CN, hits_CN, strict=True)):
            for place, loss, written in zip(places, losses, hits, strict=True):
                found[candidate][place] = Heard(loss, written == len(rows[place].ids) - rows[place].start)
    return [[each for each in own if each is not None] for own in found]


def _batch(rows: Sequence[Answered]) -> RowBatch:
    """Rows filled up to the longest with tokens that are a segment of their own."""
    shape = (len(rows), max(len(row.ids) for row in rows))
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels, document = np.full(shape, NO_LABEL, np.int64), np.full(shape, -1, np.int32)
    for place, row in enumerate(rows):
        length = len(row.ids)
        ids[place, :length], positions[place, :length] = row.ids, range(length)
        positions[place, length:] = range(shape[1] - length)
        labels[place, row.start - 1 : length - 1] = row.ids[row.start :]
        document[place, :length] = 0
    return RowBatch(ids, positions, labels, document)


def result(probe: Probe, rows: Sequence[Answered], heard: Sequence[Heard]) -> dict[str, Any]:
    """The share of items that a candidate got right."""
    if not isinstance(probe, ChoiceProbe):
        return _share([each.written for each in heard])
    right, right_per_byte, start = [], [], 0
    for item in probe.items:
        losses = [each.loss for each in heard[start : start + len(item.choices)]]
        sizes = [row.size for row in rows[start : start + len(item.choices)]]
        right.append(_least([*losses]) == item.answer)
        right_per_byte.append(_least([loss / size for loss, size in zip(losses, sizes, strict=True)]) == item.answer)
        start += len(item.choices)
    return {**_share(right), "accuracy_per_byte": sum(right_per_byte) / len(right_per_byte)}


def _least(losses: Sequence[float]) -> int | None:
    """The place of the one smallest loss; None where two share it, or any is no number."""
    least = min(losses)
    alone = sum(loss == least for loss in losses) == 1 and all(math.isfinite(loss) for loss in losses)
    return losses.index(least) if alone else None


def _share(right: Sequence[bool]) -> dict[str, Any]:
    """A share with its 95 % interval (Wilson 1927)."""
    count, share = len(right), sum(right) / len(right)
    middle = (share + SURELY**2 / (2 * count)) / (1 + SURELY**2 / count)
    reach = SURELY / (1 + SURELY**2 / count) * math.sqrt(share * (1 - share) / count + SURELY**2 / (4 * count**2))
    return {"items": count, "accuracy": share, "low": max(0.0, middle - reach), "high": min(1.0, middle + reach)}
