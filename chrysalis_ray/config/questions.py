"""Probe tasks as people write them: questions with answers, in a YAML of their own or inside of an experiment.

    name: plurals
    kind: multiple_choice
    items:
      - {prompt: "one mouse, two", choices: [" mice", " mouses"], answer: 0}

    name: capitals
    kind: exact_match
    items:
      - {prompt: "The capital of France is", answer: " Paris"}

    name: sums
    kind: exact_match
    by: generation
    max_new_tokens: 8
    stop: ["\n"]
    items:
      - {prompt: "2 + 2 =", answer: "4"}
      - {messages: [{role: user, content: "How much is 2 + 3?"}], answer: "5"}

By likelihood nothing is added between a prompt and what follows it: write the space that belongs there. By generation white
space around an answer does not count. `messages` are rendered with the base's own chat template, and the assistant answers.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from chrysalis_ray.config.blueprint import Written
from chrysalis_ray.config.population import Name

Text = Annotated[str, Field(min_length=1)]


class Message(Written):
    """What was said before the assistant answers."""

    role: Literal["system", "user", "assistant"]
    content: Text


class Question(Written):
    """A prompt, or a conversation that the assistant is to go on with."""

    prompt: Text | None = None
    messages: Annotated[tuple[Message, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Question:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("write a prompt, or messages: one of the two")
        if self.messages and self.messages[-1].role != "user":
            raise ValueError(f"messages end with the {self.messages[-1].role}; the user speaks last, the assistant answers")
        return self

    @property
    def shown(self) -> str:
        """The question in short, for people."""
        return (self.prompt if self.prompt is not None else self.messages[-1].content if self.messages else "")[:40]


class Choice(Question):
    """A question and what may follow it; `answer` numbers the right one from 0."""

    choices: Annotated[tuple[Text, ...], Field(min_length=2)]
    answer: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _one_of_them(self) -> Choice:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer is {self.answer}, the choices are numbered 0 to {len(self.choices) - 1}")
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("two choices are the same text")
        return self


class Match(Question):
    """A question and the text that is right after it."""

    answer: Text


class Pattern(Question):
    """A question and a regular expression (Python's `re`) that is found somewhere in a right answer."""

    pattern: Text

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern


class Writing(Written):
    """How long a candidate may write, greedily: so many tokens, or until it has written one of `stop`, which does not count."""

    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    stop: Annotated[tuple[Text, ...], Field(max_length=16)] = ()


class ChoiceProbe(Written):
    """Right is the choice that is likelier than all others."""

    name: Name
    kind: Literal["multiple_choice"]
    items: Annotated[tuple[Choice, ...], Field(min_length=1)]


class MatchProbe(Writing):
    """Right is an answer that greedy decoding would write, token for token; by generation, the same text but for white space
    around it."""

    name: Name
    kind: Literal["exact_match"]
    by: Literal["likelihood", "generation"] = "likelihood"
    items: Annotated[tuple[Match, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _only_where_it_writes(self) -> MatchProbe:
        unheard = sorted({"max_new_tokens", "stop"} & self.model_fields_set)
        if self.by == "likelihood" and unheard:
            raise ValueError(f"{unheard[0]} is of what is written; add `by: generation`, or leave it out")
        return self


class ContainsProbe(Writing):
    """Right is whatever is written with the answer in it."""

    name: Name
    kind: Literal["contains"]
    items: Annotated[tuple[Match, ...], Field(min_length=1)]


class PatternProbe(Writing):
    """Right is whatever is written in which the pattern is found."""

    name: Name
    kind: Literal["regex"]
    items: Annotated[tuple[Pattern, ...], Field(min_length=1)]


class FileProbe(Written):
    """A probe that stands in a file of its own."""

    kind: Literal["file"]
    path: Text


Probe = ChoiceProbe | MatchProbe | ContainsProbe | PatternProbe
AnyProbe = Annotated[Probe, Field(discriminator="kind")]


def _named_by_path(value: Any) -> Any:
    return {"kind": "file", "path": value} if isinstance(value, str) else value


# A file, relative to the experiment, or the probe itself.
WrittenProbe = Annotated[
    Annotated[FileProbe | Probe, Field(discriminator="kind")],
    BeforeValidator(_named_by_path, json_schema_input_type=str | AnyProbe),
]


def is_generated(probe: Probe) -> bool:
    """Whether a candidate answers by writing."""
    return isinstance(probe, ContainsProbe | PatternProbe) or (isinstance(probe, MatchProbe) and probe.by == "generation")
