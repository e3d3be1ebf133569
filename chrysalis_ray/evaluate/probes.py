"""Probe tasks: what candidates answer to questions, in the same packed passes that judge their losses.

    multiple choice    right where the right choice is likelier than every other; `accuracy_per_byte` divides a choice's
                       log-likelihood by its bytes first, so that long choices are not held against themselves
    exact match        right where greedy decoding writes the answer, token for token; by generation, where the text that was
                       written is the answer, but for white space around it
    contains, regex    right where the answer, or the pattern, is found in what was written

The first two are likelihoods of a text after its prompt: teacher forced, every token that greedy decoding would have written is
the likeliest one given all before it, so that nothing has to be generated to know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chrysalis_ray.config.questions import ChoiceProbe, ContainsProbe, MatchProbe, Probe, is_generated
from chrysalis_ray.evaluate.asking import ask_candidates
from chrysalis_ray.evaluate.judging import Find
from chrysalis_ray.evaluate.proportions import paired_difference, share
from chrysalis_ray.evaluate.questions import Questions, Reader, Replies, cut_at, questions_of
from chrysalis_ray.evaluate.subjects import Candidate
from chrysalis_ray.training.pack import Pack


@dataclass(frozen=True)
class Marks:
    """Which items of a probe a candidate got right. `per_byte` where there are choices, `said` where it wrote."""

    right: tuple[bool, ...]
    per_byte: tuple[bool, ...] | None = None
    said: tuple[str, ...] | None = None

    def of(self, items: Sequence[int]) -> Marks:
        """The marks of some items."""

        def some(values: Any) -> Any:
            return None if values is None else tuple(values[item] for item in items)

        return Marks(some(self.right), some(self.per_byte), some(self.said))

    def told(self) -> dict[str, Any]:
        """Items, accuracy with its interval and, where there are choices, accuracy per byte."""
        found: dict[str, Any] = share(self.right)
        return found if self.per_byte is None else {**found, "accuracy_per_byte": sum(self.per_byte) / len(self.per_byte)}


def judge_probes(
    pack: Pack,
    reader: Reader,
    longest: int | None,
    probes: Sequence[Probe],
    candidates: Sequence[Candidate],
    find: Find,
    against: str | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """probe -> candidate -> items, accuracy with its interval and, where there are choices, accuracy per byte.

    With `against`, one of the candidates, also how much more or less than it each gets right, paired over the items. Rows may
    be as long as `longest`. Raises EvaluationError for an item that is longer.
    """
    questions = questions_of(reader, probes, longest)
    replies = ask_candidates(pack, questions, candidates, find, reader.decode)
    marks = {name: marked(reader, probes, questions, own) for name, own in replies.items()}
    told = {probe.name: {name: own[probe.name].told() for name, own in marks.items()} for probe in probes}
    others = [name for name in marks if name != against]
    for probe in probes if against is not None else ():
        surely = 1.0 - 0.05 / max(1, len(others))
        for name in others:
            pair = marks[name][probe.name].right, marks[against or ""][probe.name].right
            mean, low, high = paired_difference(*pair, surely)
            told[probe.name][name]["against"] = {"of": against, "mean": mean, "low": low, "high": high}
    return told


def marked(reader: Reader, probes: Sequence[Probe], questions: Questions, replies: Replies) -> dict[str, Marks]:
    """probe -> the marks of one candidate, from its replies to `questions_of` these probes."""
    heard, said = replies
    marks, next_heard, next_said = {}, 0, 0
    for probe in probes:
        if is_generated(probe):
            own = said[next_said : next_said + len(probe.items)]
            next_said += len(own)
            marks[probe.name] = _marks_of_writing(reader, probe, own)
        elif isinstance(probe, ChoiceProbe):
            count = sum(len(item.choices) for item in probe.items)
            rows = slice(next_heard, next_heard + count)
            sizes = [row.size for row in questions.answered[rows]]
            marks[probe.name] = _marks_of_choices(probe, [loss for loss, _ in heard[rows]], sizes)
            next_heard += count
        else:
            marks[probe.name] = Marks(tuple(written for _, written in heard[next_heard : next_heard + len(probe.items)]))
            next_heard += len(probe.items)
    return marks


def _marks_of_choices(probe: ChoiceProbe, losses: Sequence[float], sizes: Sequence[int]) -> Marks:
    right, per_byte, start = [], [], 0
    for item in probe.items:
        rows = slice(start, start + len(item.choices))
        right.append(_least(losses[rows]) == item.answer)
        by_size = [loss / size for loss, size in zip(losses[rows], sizes[rows], strict=True)]
        per_byte.append(_least(by_size) == item.answer)
        start += len(item.choices)
    return Marks(tuple(right), tuple(per_byte))


def _marks_of_writing(reader: Reader, probe: Probe, written: Sequence[Sequence[int]]) -> Marks:
    assert not isinstance(probe, ChoiceProbe)
    said = tuple(cut_at(reader.decode(ids), probe.stop) for ids in written)
    if isinstance(probe, MatchProbe):
        right = [text.strip() == item.answer.strip() for text, item in zip(said, probe.items, strict=True)]
    elif isinstance(probe, ContainsProbe):
        right = [item.answer in text for text, item in zip(said, probe.items, strict=True)]
    else:
        right = [re.search(item.pattern, text) is not None for text, item in zip(said, probe.items, strict=True)]
    return Marks(tuple(right), said=said)


def _least(losses: Sequence[float]) -> int | None:
    """The place of the one smallest loss; None where two share it, or any is no number."""
    least = min(losses)
    alone = sum(loss == least for loss in losses) == 1 and all(math.isfinite(loss) for loss in losses)
    return list(losses).index(least) if alone else None
