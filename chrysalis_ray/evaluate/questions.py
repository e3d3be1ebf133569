"""Probes in tokens: what a body is asked, without their answers' meaning. `subjects.py` has the plain data of it.

Reader      the base's tokenizer and chat template: the only one here that knows text
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from chrysalis_ray.config.questions import Choice, ChoiceProbe, PatternProbe, Probe, Question, is_generated
from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.evaluate.subjects import Answered, Prompt, Questions, Replies
from chrysalis_ray.genome.chat import ChatTokenizer, load_chat_tokenizer
from chrysalis_ray.genome.tokenizer import DocumentTokenizer, load_tokenizer

__all__ = [
    "Answered",
    "Prompt",
    "Questions",
    "Reader",
    "Replies",
    "answered_rows",
    "cut_at",
    "questions_of",
    "room_of",
    "written_prompts",
]

WINDOWS = ("max_position_embeddings", "n_positions", "sliding_window", "attention_window_size", "attention_chunk_size")


@dataclass(frozen=True)
class Reader:
    """Text to tokens and back, as the base in `folder` has it. `template` is a file that stands in for its chat template."""

    folder: Path
    template: Path | None = None

    @cached_property
    def tokenizer(self) -> DocumentTokenizer:
        return load_tokenizer(self.folder)

    @cached_property
    def chat(self) -> ChatTokenizer:
        return load_chat_tokenizer(self.folder, self.template)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens left out."""
        assert self.tokenizer.decode is not None
        return self.tokenizer.decode(list(ids))

    def prompt(self, question: Question, where: str) -> list[int]:
        """A prompt in tokens; a conversation as the chat template has it, up to the assistant's turn.

        Raises ModelError where the base has no template, GenomeError for a conversation that it cannot render.
        """
        if question.messages is not None:
            return self.chat.cue([message.model_dump() for message in question.messages], where)
        return self.encode([question.prompt or ""])[0]


def room_of(folder: Path) -> int | None:
    """The most tokens that a base was made for, as its config says; None where it does not."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    told = {**config, **config.get("text_config", {})}
    if not told.get("use_sliding_window", True):
        told.pop("sliding_window", None)
    return min((int(told[name]) for name in WINDOWS if told.get(name)), default=None)


def questions_of(reader: Reader, probes: Sequence[Probe], longest: int | None) -> Questions:
    """Every question of every probe, in order. Rows may be as long as `longest`; raises EvaluationError for a longer one."""
    answered: list[Answered] = []
    prompts: list[Prompt] = []
    for probe in probes:
        if is_generated(probe):
            prompts += written_prompts(reader, probe, longest)
        else:
            answered += answered_rows(reader, probe, longest)
    return Questions(tuple(answered), tuple(prompts))


def answered_rows(reader: Reader, probe: Probe, longest: int | None) -> list[Answered]:
    """Every prompt of a probe with every answer, in order."""
    assert not isinstance(probe, PatternProbe)
    pairs: list[tuple[Question, str]] = []
    for item in probe.items:
        pairs += [(item, answer) for answer in (item.choices if isinstance(item, Choice) else (item.answer,))]
    rows = []
    for question, answer in pairs:
        if question.messages is not None:
            before = reader.prompt(question, probe.name)
            whole, start = [*before, *reader.encode([answer])[0]], len(before)
        else:
            before, whole = reader.encode([question.prompt or "", (question.prompt or "") + answer])
            # where a token spans the seam, the answer begins with it; the first token of all has nothing before it
            same = next((n for n, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1]), len(before))
            start = max(1, min(same, len(whole) - 1))
        if len(whole) < 2 or (longest is not None and len(whole) > longest):
            raise EvaluationError(
                f"{probe.name}: {question.shown!r} with {answer[:40]!r} has {len(whole)} tokens; the base takes 2 to {longest}",
                "make the prompt shorter, or longer",
            )
        rows.append(Answered(tuple(whole), start, len(answer.encode())))
    return rows


def written_prompts(reader: Reader, probe: Probe, longest: int | None) -> list[Prompt]:
    """Every prompt of a probe that is answered by writing."""
    assert not isinstance(probe, ChoiceProbe)
    prompts = []
    for item in probe.items:
        ids = reader.prompt(item, probe.name)
        if not ids or (longest is not None and len(ids) + probe.max_new_tokens > longest):
            raise EvaluationError(
                f"{probe.name}: {item.shown!r} has {len(ids)} tokens and is answered with up to {probe.max_new_tokens}; "
                f"the base takes {longest} together, and at least one to begin with",
                "make the prompt shorter, or max_new_tokens less",
            )
        prompts.append(Prompt(tuple(ids), probe.max_new_tokens, probe.stop))
    return prompts


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text up to where the first of `stop` begins."""
    return text[: min((place for word in stop if (place := text.find(word)) >= 0), default=len(text))]
